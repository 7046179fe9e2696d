"""Load the teacher: any diffusers pipeline with a supported transformer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.common.devices import weights_dtype
from ppcl.common.files import read_mapping
from ppcl.common.outside import printable
from ppcl.common.tensor_files import needed_variant, read_tensor_header, weights_variant
from ppcl.config.names import TRANSFORMER
from ppcl.errors import ArtifactError, ModelError, UserError
from ppcl.modules.compressed import MODULE, register
from ppcl.teacher.families import ADAPTERS, adapter_class, adapter_for
from ppcl.teacher.stored import (
    QUANTISED,
    check_shards,
    check_stored,
    check_trainable,
    has_own_class,
    is_quantised,
    loaded_weights,
    not_a_pipeline,
    transformers_in,
    weight_map,
)

AGAIN = "fetch the pipeline again"
MOST_LAYERS, MOST_OF_CONFIG = 1000, 100_000_000
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WEIGHTS_NAME = "diffusion_pytorch_model"
# what diffusers and transformers raise for files and packages that do not fit
LOADING_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, ImportError)
EMBEDDED = {"emoji": Path(__file__).resolve().parents[1] / "assets" / "teacher"}


def model_path(model: str) -> str:
    """Return the folder of an embedded model, or ``model`` itself."""
    return str(EMBEDDED.get(model, model))


def source_name(model: str) -> str:
    """What a compressed model says it was made from: the hub id or embedded name, of a folder its name alone."""
    return Path(model).resolve().name if Path(model).is_dir() and model not in EMBEDDED else model


def stored_folder(model: str) -> Path | None:
    """Return where a pipeline's files are: its folder, or its snapshot in the hub's cache; None if neither is there."""
    folder = Path(model_path(model))
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "model_index.json")
    except ValueError:  # no hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def two_transformers(model: str) -> list[str]:
    """Names of the two transformers of a pipeline whose index is here.

    Raises:
        ModelError: It has not two.
    """
    folder = stored_folder(model)
    names = transformers_in(folder) if folder is not None else []
    if len(names) != 2:
        kinds = f"{len(names)} transformer{'s' * (len(names) != 1)}"
        raise ModelError(f"{model} has {kinds}, and --component both is for pipelines with two; leave it out")
    return names


def pipeline_class(model: str) -> Any | None:
    """The class of a pipeline whose files are here, as its index names it; None where that is not known."""
    import diffusers

    folder = stored_folder(model)
    has_index = folder is not None and (folder / "model_index.json").is_file()
    index = read_index(folder) if folder is not None and has_index else {}
    return getattr(diffusers, str(index.get("_class_name")), None)


def stored_dtype(model: str, variant: str | None = None, component: str = TRANSFORMER) -> torch.dtype | None:
    """The dtype that most bytes of a pipeline's stored transformer have, in the files of a variant if there are any.

    Args:
        model: ``emoji``, a folder, or a hub id.
        variant: In the weights' file names.
        component: Which transformer.

    Returns:
        float32, bfloat16 or float16, and bfloat16 for float8, which nothing calculates in; None where the files are not
        here or hold something else (quantised weights).
    """
    folder = stored_folder(model)
    return None if folder is None else dtype_in(folder / component, variant)


def dtype_in(place: Path, variant: str | None = None) -> torch.dtype | None:
    """The dtype that most bytes of a component's files have; see :func:`stored_dtype`."""
    sizes: Counter[str] = Counter()
    for file in loaded_weights(place, variant):
        for entry in read_tensor_header(file).values():
            begin, end = entry["data_offsets"]
            sizes[entry["dtype"]] += end - begin
    kinds = {"F32": torch.float32, "F16": torch.float16}
    kinds |= dict.fromkeys(("BF16", "F8_E4M3", "F8_E5M2"), torch.bfloat16)
    return kinds.get(max(sizes, key=lambda name: sizes[name])) if sizes else None


def read_index(folder: Path) -> dict[str, Any]:
    """Read a pipeline folder's ``model_index.json``.

    Raises:
        ModelError: It is missing or damaged.
    """
    index = folder / "model_index.json"
    components = read_mapping(index, ModelError, AGAIN)
    check_names(index, components)
    return components


def component_entry(folder: Path, name: str) -> tuple[str, str]:
    """Library and class of a component, as a pipeline folder's index names them.

    Raises:
        ModelError: It names none.
    """
    entry = read_index(folder).get(name)
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise ModelError(f"{folder / 'model_index.json'} is damaged (it names no class of '{name}'); {AGAIN}")
    return entry[0], entry[1]


def model_of_run(run: Path) -> str:
    """The model that a run directory says it compresses.

    Raises:
        ArtifactError: Its ledger is missing or damaged.
    """
    model = read_mapping(run / "stages.json").get("model")
    if not isinstance(model, str) or not model:
        raise ArtifactError(f"{run / 'stages.json'} is damaged (it names no model); run ppcl compress again")
    return model


def check_folder(folder: Path, component: str = TRANSFORMER) -> None:
    """Check a pipeline folder before any heavy import touches it.

    Args:
        folder: The pipeline's.
        component: The transformer that is to be compressed.

    Raises:
        ModelError: It is not a pipeline, has no transformer, or a weight file is damaged.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(not_a_pipeline(folder))
    components = read_index(folder)
    if TRANSFORMER not in components:
        raise ModelError(
            f"{folder} has no transformer ({components.get('_class_name', 'unknown pipeline')}); "
            "ppcl compresses diffusion transformers, not U-Nets"
        )
    if component != TRANSFORMER and component not in (names := transformers_in(folder)):
        raise ModelError(f"{folder} has no transformer {component!r}; it has {' and '.join(names)}, mend --component")
    _check_family(components[component])
    check_trainable(folder, component)
    for config in sorted(folder.glob("*/config.json")):
        check_config(read_mapping(config, ModelError, AGAIN), config)
    check_stored(folder)
    for weights in sorted(folder.glob("*/*.safetensors")):
        read_tensor_header(weights)
    for weights in sorted(file for pattern in PICKLED for file in folder.glob(f"*/{pattern}")):
        if not any(weights.parent.glob("*.safetensors")):
            raise ModelError(
                f"{weights} is a pickle, which may hold any code and is not opened; fetch {weights.parent.name} as "
                "safetensors, or save it so with save_pretrained"
            )


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a model's config with sizes that no model has, which would be built until memory ends.

    Args:
        config: Of a transformer, a text encoder, a VAE.
        path: Where it lies, for the message.

    Raises:
        ModelError: There is such a size.
    """
    entries = list(config.items())
    while entries:
        key, value = entries.pop()
        if isinstance(value, dict):
            entries += value.items()
        elif isinstance(value, list):
            entries += [(key, item) for item in value]
        elif isinstance(value, int) and abs(value) > (MOST_LAYERS if "layers" in key else MOST_OF_CONFIG):
            raise ModelError(f"{path} has {key} {value}, which is no model's; {AGAIN}")


def check_names(index: Path, components: Mapping[str, Any]) -> None:
    """Refuse a pipeline's index whose components could not be arguments of a pipeline: each is the name of a folder.

    Raises:
        ModelError: There is such a component.
    """
    wrong = [name for name in components if not name.isidentifier()]
    if wrong:
        raise ModelError(f"{index} names a component {printable(repr(wrong[0]))}; fetch the pipeline again")


def weight_files(folder: Path, variant: str | None = None, component: str = TRANSFORMER) -> dict[str, Path]:
    """The file that holds each weight of a pipeline's transformer.

    Args:
        folder: The pipeline's.
        variant: In the files' names; files without it are taken where there are none with it, and the other way round.
        component: Which transformer.

    Raises:
        ModelError: There are no safetensors, or one is damaged.
    """
    place = folder / component
    for kind in dict.fromkeys((variant, None, weights_variant(folder))):
        suffix = f".{kind}" if kind else ""
        listing = place / f"{WEIGHTS_NAME}.safetensors.index{suffix}.json"
        file = place / f"{WEIGHTS_NAME}{suffix}.safetensors"
        if listing.is_file():
            check_shards(listing)
            return {name: place / shard for name, shard in weight_map(listing).items()}
        if file.is_file():
            return dict.fromkeys(read_tensor_header(file), file)
    raise ModelError(f"{place} holds no {WEIGHTS_NAME}.safetensors; fetch the pipeline again")


def absent_parts(folder: Path) -> list[str]:
    """Components that a pipeline folder was saved without, although its class asks for them.

    Such a pipeline (SD3 without its T5, for one) loads only if they are named as None.

    Args:
        folder: A pipeline folder; empty for anything else.
    """
    import diffusers

    index = folder / "model_index.json"
    if not index.is_file():
        return []
    components = read_index(folder)
    kind = getattr(diffusers, str(components.get("_class_name")), None)
    optional = getattr(kind, "_optional_components", ())
    return [name for name, entry in components.items() if entry == [None, None] and name not in optional]


def loading_arguments(folder: Path) -> str:
    """What plain diffusers must be told beside the folder to load a pipeline: ``, variant="bf16"`` or nothing."""
    variant = weights_variant(folder)
    absent = "".join(f", {name}=None" for name in absent_parts(folder))
    trust = ", trust_remote_code=True" if any(folder.glob(f"*/{MODULE}.py")) else ""
    dtype = ", dtype=torch.bfloat16" if is_quantised(folder) else ""
    return (f', variant="{variant}"' if variant else "") + dtype + trust + absent


def loading_call(folder: Path) -> str:
    """The Python line that loads a pipeline folder: plain diffusers, and our import where its class is ours."""
    code_goes_along = any(folder.glob(f"*/{MODULE}.py"))
    call = f'DiffusionPipeline.from_pretrained("{folder}"{loading_arguments(folder)})'
    return f"import ppcl.pipelines; {call}" if has_own_class(folder) and not code_goes_along else call


def _check_family(entry: Any) -> None:
    """Refuse a stock class that has no adapter before its weights are read."""
    import diffusers

    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if library == "diffusers" and name not in ADAPTERS:
        kind = getattr(diffusers, str(name), None)
        if isinstance(kind, type):
            adapter_class(kind)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def check_model(model: str) -> None:
    """Check a model's name, and its folder if it is one, without loading it.

    Raises:
        ModelError: It is nothing that could be loaded.
    """
    path = model_path(model)
    if Path(path).is_dir():
        check_folder(Path(path))
    elif Path(path).is_file():
        raise ModelError(not_a_pipeline(Path(path)))
    elif not is_hub_id(path):
        known = ", ".join(EMBEDDED)
        raise ModelError(
            f"model {model!r} is neither a pipeline folder, a hub id (owner/name), nor embedded ({known}); "
            "check the name"
        )


def load_pipeline(
    model: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    component: str = TRANSFORMER,
) -> Any:
    """Load a text-to-image pipeline, frozen, in evaluation mode.

    Args:
        model: ``emoji``, a folder, or a hub id.
        device: Where it goes.
        dtype: Weights' dtype; float32 on CPU and bfloat16 elsewhere if None.
        variant: In the weights' file names; components without such files are loaded without it.
        component: The transformer that is to be compressed.

    Returns:
        The ``DiffusionPipeline``, without a progress bar.

    Raises:
        ModelError: It cannot be found or loaded, or its transformer is not supported.
    """
    check_model(model)
    check_folder(fetch_files(model), component)
    pipeline = open_pipeline(model, device, dtype, variant)
    transformer = getattr(pipeline, component, None)
    if transformer is None:
        raise ModelError(
            f"{type(pipeline).__name__} has no transformer; ppcl compresses diffusion transformers, not U-Nets"
        )
    adapter_for(transformer)
    check_complete(model, transformer)
    return on_device(model, pipeline, device)


def on_device(model: str, pipeline: Any, device: torch.device) -> Any:
    """Bring a loaded pipeline to a device.

    Raises:
        ModelError: A part of it cannot go there: one that is quantised, or whose weights were not in the files.
    """
    try:
        return pipeline.to(device)
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model {model!r} cannot be brought to {device}: {reason}; check its files") from None


def fetch_files(model: str) -> Path:
    """Have all files of a model here, those of a hub model in the hub's cache; from then on that commit is the model.

    Returns:
        The folder.

    Raises:
        ModelError: They cannot be fetched, or are not whole.
    """
    folder = stored_folder(model)
    if folder is not None and (Path(model_path(model)).is_dir() or _is_whole(folder)):
        check_stored(folder)
        return folder
    try:
        folder = _download(model)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"model {model!r} cannot be fetched: {reason[:300]}; check the name and the network") from None
    check_stored(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        check_stored(folder)
    except UserError:
        return False
    return True


def _download(model: str) -> Path:
    """Fetch a hub model's files, of the variant that there is where there are none without one."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import list_repo_files

    folder = Path(DiffusionPipeline.download(model))
    if _is_whole(folder):
        return folder
    try:
        variant = needed_variant(list_repo_files(model))
    except (OSError, ValueError):  # no network: what is missing is said
        return folder
    return Path(DiffusionPipeline.download(model, variant=variant)) if variant else folder


def open_pipeline(
    model: str,
    device: torch.device,
    dtype: torch.dtype | None,
    variant: str | None = None,
    loaded: Mapping[str, Any] | None = None,
) -> Any:
    """Load any diffusers pipeline, frozen and quiet, on the CPU still; see :func:`load_pipeline`.

    Args:
        model: ``emoji``, a folder, or a hub id.
        device: Where it will go.
        dtype: Weights' dtype; float32 on CPU and bfloat16 elsewhere if None.
        variant: In the weights' file names.
        loaded: Components that are there already.

    Raises:
        ModelError: It cannot be found or loaded.
    """
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline

    register(ADAPTERS)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    folder = fetch_files(model) if stored_folder(model) is None else stored_folder(model)
    assert folder is not None
    variant = variant or weights_variant(folder)
    if dtype is None:
        dtype = weights_dtype(device)
    if is_quantised(folder):
        dtype = torch.bfloat16  # which its formats are multiplied in, on a CPU, too
    try:
        given: dict[str, Any] = dict.fromkeys(absent_parts(folder)) | dict(loaded or {})
        given |= _own_transformers(folder, given, dtype=dtype, variant=variant)
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, variant=variant, use_safetensors=True, **given
        )
    except Exception as error:  # diffusers and transformers raise whatever files that are none of theirs bring about
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"model {model!r} cannot be loaded: {reason[:300]}; check the name, the network and the files"
        ) from None
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _own_transformers(folder: Path, loaded: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The transformers of a pipeline whose code went along, by ppcl's own class: no file of the folder is run."""
    import diffusers

    parts = {}
    for place in sorted(file.parent for file in folder.glob(f"*/{MODULE}.py")):
        library, name = component_entry(folder, place.name)
        kind = getattr(diffusers, name, None) if library == MODULE else None
        if kind is not None and place.name not in loaded:
            parts[place.name] = kind.from_pretrained(folder, subfolder=place.name, **options)
    return parts


def check_complete(model: str, transformer: Any) -> None:
    """Refuse a transformer whose config and weight files disagree.

    diffusers loads both kinds of disagreement without an error: a weight that is not in the files stays
    unset, or is drawn at random, and blocks beyond the config's count are left out.

    Args:
        model: What it was loaded from, for the message.
        transformer: As diffusers loaded it.

    Raises:
        ModelError: Weights are missing, or the files hold more blocks than the config counts.
    """
    stored = _stored_names(Path(str(transformer.config.get("_name_or_path") or "")))
    known = stored if stored and not transformer.config.get(QUANTISED) else set()
    unset = [n for n, parameter in transformer.named_parameters() if parameter.is_meta or (known and n not in known)]
    if unset:
        raise ModelError(
            f"model {model!r}: the transformer's config.json and its weights disagree (the files have no '{unset[0]}', "
            f"and {len(unset) - 1} more); mend config.json, or fetch it again"
        )
    check_counts(model, transformer, stored)


def check_counts(model: str, transformer: Any, stored: Iterable[str]) -> None:
    """Refuse files that hold more blocks than the transformer's config counts.

    Args:
        model: What it is loaded from, for the message.
        transformer: As its config builds it.
        stored: Names of the weights in the files.

    Raises:
        ModelError: They do.
    """
    stored = list(stored)
    for spec in adapter_for(transformer).stacks:
        blocks = len(getattr(transformer, spec.name))
        parts = [
            name.removeprefix(f"{spec.name}.").split(".")[0] for name in stored if name.startswith(f"{spec.name}.")
        ]
        held = 1 + max((int(part) for part in parts if part.isdecimal()), default=-1)
        if held > blocks:
            raise ModelError(
                f"model {model!r}: the transformer's config.json and its weights disagree ({spec.count_field} is "
                f"{blocks}, but the files hold {held} of '{spec.name}'); mend config.json, or fetch it again"
            )


def _stored_names(folder: Path) -> set[str]:
    """Names of the tensors in a transformer's folder; empty where they are not in diffusers' own files."""
    return {name for file in loaded_weights(folder) for name in read_tensor_header(file)}
