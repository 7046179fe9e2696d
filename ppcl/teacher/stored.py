"""Which files of a pipeline folder are loaded, whether they are whole, and what they are known by. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ppcl.common.files import digest, read_json
from ppcl.common.outside import inside
from ppcl.common.tensor_files import read_tensor_header, variant_of, weights_variant
from ppcl.config.names import PREFIX, TRANSFORMER
from ppcl.errors import ArtifactError, ModelError

INDEX = "model_index.json"
QUANTISED = "quantization_config"  # of a config whose weights diffusers or transformers quantised
_WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "Extractor", "Scheduler")
_BESIDE = (".md", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".gitattributes")  # for people
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx")
_SCALES = ("scale_weight", "weight_scale", "scale_input", "scaled_fp8", "comfy_quant", "weight_scale_inv")
_WHOLE = "pipe.save_pretrained(DIR), and give DIR"


def components(folder: Path) -> dict[str, str]:
    """The classes of a pipeline's components by name, without those that it was saved without."""
    entries = _read(folder / INDEX).items()
    return {name: str(entry[1]) for name, entry in entries if _is_component(name, entry)}


def transformers_in(folder: Path) -> list[str]:
    """Names of a pipeline's transformers: the usual one first, then those of the same class beside it."""
    kinds = {name: kind.removeprefix(PREFIX) for name, kind in components(folder).items()}
    kind = kinds.pop(TRANSFORMER, None)
    return [] if kind is None else [TRANSFORMER, *(name for name in kinds if kinds[name] == kind)]


def has_own_class(folder: Path) -> bool:
    """Whether a transformer of a pipeline folder is of a class of ours, with smaller modules."""
    return any(kind.startswith(PREFIX) for kind in components(folder).values())


def _is_component(name: str, entry: Any) -> bool:
    return name.isidentifier() and isinstance(entry, list) and len(entry) == 2 and bool(entry[1])


def _read(path: Path) -> dict[str, Any]:
    """A mapping of a JSON file of a model; empty where there is no such file."""
    try:
        content = read_json(path) if path.is_file() else {}
    except ArtifactError as error:
        raise ModelError(f"{str(error).partition('; ')[0]}; fetch the pipeline again") from None
    return content if isinstance(content, dict) else {}


def loaded_weights(place: Path, variant: str | None = None) -> list[Path]:
    """The safetensors of a component that are loaded.

    Args:
        place: The component's folder.
        variant: Taken where there is one; else files without it, else those of the first one that is there.
    """
    by_variant: dict[str | None, list[Path]] = {}
    for file in sorted(place.glob("*.safetensors")):
        by_variant.setdefault(variant_of(file.name), []).append(file)
    kinds = [kind for kind in (variant, None, *by_variant) if kind in by_variant]
    return by_variant[kinds[0]] if kinds else []


def check_stored(folder: Path) -> None:
    """Refuse a pipeline whose files are not all there, or hold weights that loading would pass over in silence.

    Raises:
        ModelError: A component or a file is missing or damaged, or a file holds a LoRA apart, or scales.
    """
    for listing in sorted(folder.glob("*/*.index*.json")):  # those that are not loaded, too
        for shard in weight_map(listing).values():
            inside(listing.parent, shard, str(listing))
    variant = weights_variant(folder)
    for name, kind in components(folder).items():
        place = folder / name
        if not place.is_dir():
            raise ModelError(f"{place} is missing ({INDEX} names it); fetch the pipeline again")
        if not _read(place / "config.json") or kind.endswith(_WITHOUT_WEIGHTS):
            continue
        _check_shards_of(place, variant)
        files = loaded_weights(place, variant)
        if not files and not any(file.suffix in _WEIGHTS and file.is_file() for file in place.iterdir()):
            raise ModelError(f"{place} holds no weights (config.json alone); fetch the pipeline again")
        for file in files:
            check_weight_names(file, read_tensor_header(file))


def is_quantised(folder: Path) -> bool:
    """Whether a pipeline's transformer is stored quantised, by its config."""
    return any(QUANTISED in _read(folder / name / "config.json") for name in transformers_in(folder))


def check_trainable(folder: Path, component: str = TRANSFORMER) -> None:
    """Refuse a transformer that is stored quantised, by its config.

    Args:
        folder: The pipeline's.
        component: Which transformer.

    Raises:
        ModelError: It is.
    """
    place = folder / component
    if settings := _read(place / "config.json").get(QUANTISED):
        method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else "unknown"
        raise ModelError(
            f"{place} is stored quantised ({method}), and such weights cannot be trained or converted; give the "
            f"pipeline that it was made from, or multiply them out where {method} is installed: "
            f"ppcl teacher {folder} --out DIR"
        )


def _check_shards_of(place: Path, variant: str | None) -> None:
    """Check the listing of shards that goes with the files that are loaded."""
    kinds = {variant_of(file.name) for file in place.glob("*.safetensors")} or {None, variant}
    kind = next((kind for kind in (variant, None) if kind in kinds), None)
    listings = sorted(place.glob("*.index*.json"))
    own = [file for file in listings if file.name.endswith(f".safetensors.index{f'.{kind}' if kind else ''}.json")]
    is_pickled = not own and not any(place.glob("*.safetensors"))
    for listing in listings if is_pickled else own:
        check_shards(listing)


def check_weight_names(file: Path, names: Iterable[str]) -> None:
    """Refuse weights under names that loading passes over in silence.

    Raises:
        ModelError: There is one.
    """
    for name in names:
        if ".base_layer." in name or ".lora_A." in name:
            raise ModelError(
                f"{file} holds a LoRA beside its layers ({name}), saved while it was loaded; save the pipeline again "
                f"where that was: pipe.fuse_lora(), pipe.unload_lora_weights(), {_WHOLE}"
            )
        if name.rpartition(".")[2] in _SCALES:
            raise ModelError(
                f"{file} is quantised with scales of its own ({name}), which diffusers does not read; give the "
                "pipeline in bf16 or fp16"
            )


def check_shards(listing: Path) -> None:
    """Refuse an index of sharded weights that is damaged or names a file that is not there."""
    shards = set(weight_map(listing).values())
    missing = sorted(name for name in shards if not inside(listing.parent, name, str(listing)).is_file())
    if missing:
        raise ModelError(
            f"{listing.parent / missing[0]} is missing ({len(missing)} of the {len(shards)} files that {listing.name} "
            "names); fetch the pipeline again"
        )


def weight_map(listing: Path) -> dict[str, str]:
    """The file that holds each tensor, by the tensor's name."""
    try:
        content = read_json(listing)["weight_map"]
        return {str(name): str(file) for name, file in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{listing} is damaged ({error or type(error).__name__}); fetch the pipeline again") from None


def not_a_pipeline(path: Path) -> str:
    """What a path is that is no pipeline folder, and how to make one of it."""
    put = f"put it into its pipeline once: ppcl teacher {path} --base PIPELINE --out DIR, and compress DIR"
    if path.is_file():
        if path.name == INDEX:
            return f"{path} is a pipeline's index; give its folder, {path.parent}"
        if path.suffix.lower() not in _WEIGHTS:
            return f"{path} is a file that holds no weights; give the pipeline's folder, a hub id or emoji"
        return f"{path} is one file, and a pipeline folder of plain weights is needed; {put}"
    if (path.parent / INDEX).is_file() and path.name in components(path.parent):
        return f"{path} is the {path.name} of a pipeline; give its folder, {path.parent}"
    if (path / "config.json").is_file():
        return f"{path} is a model without its pipeline; {put}"
    if (path / "snapshots").is_dir():
        name = path.name.removeprefix("models--").replace("--", "/")
        return f"{path} is the hub's cache of {name}; give {name}, or one of the folders in {path / 'snapshots'}"
    if (path / "stages.json").is_file():
        return f"{path} is a run of ppcl, not a diffusers pipeline; give {path / 'pipeline'}"
    if any((path / name).is_file() for name in ("adapter_config.json", "pytorch_lora_weights.safetensors")):
        return f"{path} is a LoRA, not a diffusers pipeline; fold it in: ppcl teacher PIPELINE --lora {path} --out DIR"
    return f"{path} is not a diffusers pipeline: {INDEX} is missing; give the pipeline's top folder"


def counted_files(folder: Path) -> dict[str, str]:
    """What a model is known by: names, sizes and ends of the files that are loaded.

    What lies beside them does not count: hidden files, texts and pictures for people, weights that are not loaded.
    Reading 40 GB to name them would take minutes; other weights differ in the last 64 kB of their files too.

    Args:
        folder: A pipeline's, or any other, of which all files count.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {str(path.relative_to(folder)): path for path in files}
    if (folder / INDEX).is_file():
        variant, parts = weights_variant(folder), components(folder)
        loaded = {file for name in parts for file in loaded_weights(folder / name, variant)}
        of_parts = {name: path for name, path in names.items() if Path(name).parts[0] in {*parts, INDEX}}
        code = {path.name: path for path in folder.glob("*.py")}
        names = {name: path for name, path in {**of_parts, **code}.items() if _counts(path, loaded)}
    visible = {name: path for name, path in names.items() if not any(part[0] == "." for part in Path(name).parts)}
    return {name: digest(path.stat().st_size, _tail(path)) for name, path in sorted(visible.items())}


def _counts(path: Path, loaded: set[Path]) -> bool:
    """Whether a component's file is read when it is loaded."""
    if path.suffix == ".safetensors" and loaded:
        return path in loaded
    is_listing = ".index." in path.name and path.suffix == ".json"  # the shards themselves count
    is_for_people = path.suffix.lower() in _BESIDE or path.name.upper().startswith(("LICEN", "NOTICE"))
    return not (is_listing or is_for_people or (path.suffix in _WEIGHTS and bool(loaded)))


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What became of counted files, in a few words: empty where nothing did."""
    words = [f"{name} is missing" for name in sorted({*before} - {*now})]
    words += [f"{name} is new" for name in sorted({*now} - {*before})]
    words = [f"{name} is another one" for name in sorted({*before} & {*now}) if before[name] != now[name]] + words
    return ", ".join(words[:2]) + (f", and {len(words) - 2} more" if words[2:] else "")


def _tail(path: Path, size: int = 65536) -> str:
    """SHA-256 of the last bytes of a file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from None
