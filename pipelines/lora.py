"""LoRA made for the teacher on a depth-compressed pipeline.

A LoRA names blocks by number, and pruning moves the numbers: loaded as it is, it lands on
other blocks, and all that diffusers may notice is that the highest numbers are missing. The
bridge renames every block key to where that block is now and drops the LoRA of blocks that are
gone. The LoRA of a run that one substitute replaces is dropped too: a substitute is a newly
trained block with weights of its own, and an update made for another block's weights means
nothing to it.

Every key of a block list is either mapped or dropped, and anything else is an error, so
nothing lands on a wrong block silently.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.common.reading import parse_json
from ppcl.config.names import TRANSFORMER
from ppcl.errors import ModelError, UserError, nearest
from ppcl.pipelines.lora_back import lora_for_teacher
from ppcl.pipelines.lora_cut import fit_replaced
from ppcl.pipelines.lora_low_rank import HOW, INNER, fold, low_rank_paths, widen
from ppcl.pipelines.lora_metadata import METADATA_KEY, remap_metadata, scaling_note
from ppcl.pipelines.lora_report import MappingReport
from ppcl.teacher.block_map import RECORD, BlockMap, block_maps, pipeline_record, smaller_modules
from ppcl.teacher.pipeline_call import other_transformers

if TYPE_CHECKING:
    from torch import Tensor

RUNS, TO = ("drop", "start"), ("student", "teacher")
CONVERTED_KEY = "ppcl_kept_blocks"  # marks files whose blocks are already those of a compressed model
# What may stand before a block list's name: nothing, diffusers' component, PEFT's wrapper, both.
_PREFIX = r"(?P<prefix>(?:base_model\.model\.)?(?:transformer\.)?)"
_BLOCK_LIKE = re.compile(r"(?:^|[._])(?P<stack>[a-z_]*(?:blocks|layers))[._](?P<index>\d+)(?=[._])")
_OTHER_COMPONENT = re.compile(r"(?:text_encoder(?:_\d)?|lora_te\d?_?)")
_FOREIGN = re.compile(r"diffusion_model\.|lora_unet_|lora_transformer_|lycoris_")  # names that diffusers converts
_WEIGHT = re.compile(r"\.(?:lora_[A-Za-z_]+|lora\.(?:up|down)|lokr_\w+|alpha|dora_scale)(?:\..+)?$")
FUSED = (".to_qkv", ".to_added_qkv", ".to_kv")  # of a LoKr; diffusers fuses the projections when it loads one
_LOAD_OPTIONS = ("adapter_name", "hotswap", "low_cpu_mem_usage")
_SOURCE_OPTIONS = (  # where diffusers reads a LoRA from
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    *("use_safetensors", "weight_name"),
)
_SECOND = "load_into_transformer_2"


def remap_lora(
    state_dict: Mapping[str, Tensor],
    kept_blocks: Mapping[str, Sequence[Any]],
    *,
    runs: str = "drop",
    starts: Mapping[str, Sequence[str | None]] | None = None,
    unpruned: Sequence[str] = (),
    replaced: Collection[str] | Mapping[str, Mapping[str, Any]] = (),
    low_rank: Collection[str] = (),
) -> tuple[dict[str, Tensor], MappingReport]:
    """Rename the blocks of a LoRA from the teacher's numbers to those of a compressed transformer.

    The LoRA of a run's blocks is dropped, because the block in their place is newly trained. With
    ``runs="start"`` the LoRA of the block that the substitute was initialised from goes to the
    substitute and the rest of the run is dropped: an approximation, better the shorter the
    distillation was. Keys that name no block (``img_in``, text encoders) stay as they are.

    Args:
        state_dict: Tensors with dotted module names (``lora_A``/``lora_B`` or ``lora_down``/``lora_up``,
            ``alpha``), with or without ``transformer.`` in front. Other formats: :func:`load_lora`.
        kept_blocks: See :func:`ppcl.pipelines.kept_blocks`.
        runs: ``drop`` or ``start``.
        starts: For ``runs="start"``: for each stack one entry a block, what its substitute started from.
        unpruned: Paths of the transformer's other block lists, whose LoRA stays as it is.
        replaced: Paths of the compressed transformer's smaller modules, or its config's ``pruning``: an update made
            for the large module's weights has nothing to act on there and is dropped. Where the config says which
            neurons or heads were kept, the update is cut to these instead.
        low_rank: Those of them that are layers of low rank and take their LoRA on the inner layer, ``down``; the
            tensors are still those of the whole layer, for :mod:`ppcl.pipelines.lora_low_rank` to fit.

    Returns:
        The renamed tensors (the same objects, but for those that were cut), and what became of each.

    Raises:
        UserError: The LoRA is of another family or format, names blocks that the teacher does not have,
            or has nothing left; ``runs`` is unknown, or asks for a start that was not recorded.
        ModelError: ``kept_blocks`` is not the record of a compressed transformer.
    """
    maps = block_maps(kept_blocks, starts)
    if runs not in RUNS:
        raise UserError(f"runs is {runs!r}; expected one of {', '.join(RUNS)}")
    dora = {key.split(".lora_")[0] for key in state_dict if ".lora_magnitude_vector" in key}
    renamed = _Renamed({}, {}, [], [], [], {}, {})
    for key, tensor in state_dict.items():
        found = _parse(key, maps, unpruned)
        if found is None:
            renamed.out[key] = tensor
            renamed.other.append(key)
            continue
        prefix, stack, index, rest = found
        position = _target(maps[stack], stack, index, runs)
        at = f"{stack}.{position}.{rest}"
        fitted, smaller, changed = fit_replaced(tensor, at, replaced, key.split(".lora_")[0] in dora)
        if position is not None and smaller in low_rank:
            at, fitted = f"{smaller}.{INNER}.{at.removeprefix(f'{smaller}.')}", tensor
        if position is None or fitted is None:
            renamed.drop(key, stack, index, smaller.removeprefix(f"{stack}.{position}"))
        else:
            renamed.move(key, f"{prefix}{at}", fitted, (stack, index, position), changed)
    return renamed.out, renamed.report()


@dataclass
class _Renamed:
    """What became of the tensors of a LoRA so far: by the fields of :class:`MappingReport`."""

    out: dict[str, Tensor]
    mapped: dict[str, str]
    dropped: list[str]
    other: list[str]
    cut: list[str]
    moved: dict[tuple[str, int], tuple[str, str]]
    lost: dict[tuple[str, int, str], str]

    def drop(self, key: str, stack: str, index: int, inside: str) -> None:
        """Nothing of a tensor of this block can act, of one module inside it or of all."""
        self.dropped.append(key)
        self.lost[stack, index, inside] = f"{stack}.{index}{inside}"

    def move(self, key: str, name: str, tensor: Tensor, place: tuple[str, int, int], is_cut: bool) -> None:
        """A tensor goes from a block of the teacher to one of the student."""
        stack, index, position = place
        self.mapped[key], self.out[name] = name, tensor
        self.moved[stack, index] = (f"{stack}.{index}", f"{stack}.{position}")
        self.cut += [name] if is_cut else []

    def report(self) -> MappingReport:
        """Sum up.

        Raises:
            UserError: Nothing is left.
        """
        if not self.out:
            reason = "all its blocks were replaced by substitutes" if self.dropped else "it has no tensors"
            raise UserError(f"nothing of this LoRA is left: {reason}; train it on the compressed pipeline instead")
        names = (tuple(self.moved[k] for k in sorted(self.moved)), tuple(self.lost[k] for k in sorted(self.lost)))
        return MappingReport(self.mapped, tuple(self.dropped), tuple(self.other), *names, cut=tuple(self.cut))


def load_lora(pipe: Any, path_or_dict: str | Path | Mapping[str, Tensor], **kwargs: Any) -> MappingReport:
    """Load a LoRA made for the teacher into a compressed pipeline, onto the right blocks.

    Whatever diffusers converts for the family (kohya, ``diffusion_model.``) is converted by
    diffusers first, then renamed by :func:`remap_lora`, checked against the transformer, and
    loaded by ``pipe.load_lora_weights``. Everything that works after that call
    (``set_adapters``, ``fuse_lora``, ``unload_lora_weights``) works after this one. A LoRA trained
    on the compressed pipeline itself has its numbers already: load it without the bridge.

    Args:
        pipe: A pipeline that ppcl exported.
        path_or_dict: A file, a folder, a hub id, or tensors by name.
        **kwargs: ``runs`` as in :func:`remap_lora`; ``low_rank`` is ``widen`` (layers of low rank grow by the LoRA's
            rank, exact) or ``fold`` (they stay, and take what they can express), see
            :mod:`ppcl.pipelines.lora_low_rank`; all else as for ``pipe.load_lora_weights``. With
            ``load_into_transformer_2`` the LoRA goes to the second expert (Wan 2.2's, for little noise). One that was
            not compressed, beside one that was, takes it as it is.

    Returns:
        What became of each tensor.

    Raises:
        UserError: See :func:`remap_lora`; also a LoRA that is not there, was converted already or does not fit, and
            an option that is unknown.
        ModelError: The pipeline was not compressed by ppcl, its class cannot load LoRA, or it is stored in int4.
    """
    from safetensors.torch import save_file

    runs, how = kwargs.pop("runs", "drop"), kwargs.pop("low_rank", "widen")
    if how not in HOW:
        raise UserError(f"low_rank is {how!r}; expected one of {', '.join(HOW)}")
    known = ("runs", "low_rank", _SECOND, *_LOAD_OPTIONS, *_SOURCE_OPTIONS)
    if unknown := [name for name in kwargs if name not in known]:  # diffusers would take no notice of them
        raise UserError(f"load_lora takes no {unknown[0]}{nearest(unknown[0], known)}; it takes {', '.join(known)}")
    options = {name: kwargs.pop(name) for name in _LOAD_OPTIONS if name in kwargs}
    component = _SECOND.removeprefix("load_into_") if kwargs.pop(_SECOND, False) else TRANSFORMER
    options |= {_SECOND: True} if component != TRANSFORMER else {}
    if not isinstance(path_or_dict, Mapping):
        _check_is_there(path_or_dict)
    _check_takes_lora(getattr(pipe, component, None))
    if _is_the_teachers(pipe, component):
        return _load_as_it_is(pipe, path_or_dict, kwargs, options, component)
    if isinstance(path_or_dict, Mapping):
        _check_kind(path_or_dict, "this LoRA")
        strength = scaling_note(path_or_dict, ())
    else:
        strength = _check_source(path_or_dict, kwargs.get("weight_name"))
    tensors, adapter, report = _bridge(pipe, path_or_dict, runs, kwargs, how, component)
    report = replace(report, strength=strength)
    if adapter is None:
        pipe.load_lora_weights(tensors, **options)
        return report
    # Given tensors, diffusers' loader has no place for the adapter's metadata; it reads it from files only.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        save_file(_storable(tensors), file, {"format": "pt", METADATA_KEY: json.dumps(adapter)})
        pipe.load_lora_weights(str(file), **options)
    return report


def _check_is_there(source: str | Path) -> None:
    """Refuse what is no hub id and not on this machine: diffusers would look for it on the hub."""
    path = Path(source)
    if not path.exists() and (path.suffix == ".safetensors" or path.is_absolute() or str(source).startswith(".")):
        raise UserError(f"no LoRA at {source}; expected a .safetensors file, a folder with one, or a hub id")


def _check_takes_lora(transformer: Any) -> None:
    """Refuse a transformer whose weights PEFT puts no LoRA on.

    Raises:
        ModelError: Its layers are torchao's int4.
    """
    layers: Iterable[Any] = getattr(transformer, "modules", tuple)()
    if any(type(getattr(layer, "weight", None)).__name__ == "Int4Tensor" for layer in layers):
        raise ModelError(
            "PEFT puts no LoRA on layers of torchao's int4; load it into a pipeline exported with "
            "export.quantize=nvfp4, int8, fp8 or nf4, or with none"
        )


def _is_the_teachers(pipe: Any, component: str) -> bool:
    """Whether a transformer has all the teacher's blocks, beside another one of the pipeline that was compressed."""
    if component != TRANSFORMER and getattr(pipe, component, None) is None:
        raise UserError(f"{type(pipe).__name__} has no {component}; leave {_SECOND} out")
    others = other_transformers(pipe, component)
    is_small = [bool(getattr(pipe, name).config.get(RECORD)) for name in (component, *others)] if others else []
    return any(is_small) and not is_small[0]


def _load_as_it_is(
    pipe: Any,
    source: str | Path | Mapping[str, Tensor],
    reading: Mapping[str, Any],
    options: Mapping[str, Any],
    component: str,
) -> MappingReport:
    """Load a LoRA into a transformer that has all the teacher's blocks."""
    name = type(pipe).__name__
    given = dict(source) if isinstance(source, Mapping) else str(source)
    try:
        keys = tuple(pipe.lora_state_dict(given, **reading))
        pipe.load_lora_weights(given, **reading, **options)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"this LoRA does not go into {component} ({reason}); check that it was made for {name}"
        ) from error
    return MappingReport({}, (), keys, (), ())


def convert_lora(
    src: str | Path,
    dst: str | Path,
    pipe_or_kept_blocks: Any,
    *,
    runs: str = "drop",
    to: str = "student",
    component: str = TRANSFORMER,
) -> MappingReport:
    """Write a LoRA file for the compressed model, which plain ``load_lora_weights`` then loads; or one for the teacher.

    The file's metadata is kept, with the block names inside the adapter's metadata
    (``rank_pattern``, ``alpha_pattern``, ``target_modules``) renamed as well. A file cannot widen layers of low
    rank: their LoRA is folded, and the report says what is left of it.

    Args:
        src: A safetensors file made for the teacher, or trained on the compressed pipeline.
        dst: The file to write (atomically).
        pipe_or_kept_blocks: The compressed pipeline, or its kept blocks; formats that diffusers has to
            convert, the way back, and the check against the transformer need the pipeline.
        runs: See :func:`remap_lora`.
        to: ``student``; or ``teacher``, for what was trained on the compressed pipeline
            (:mod:`ppcl.pipelines.lora_back`).
        component: Which transformer of the pipeline it is for.

    Returns:
        What became of each tensor.

    Raises:
        UserError: See :func:`load_lora`; also a file that cannot be read or written.
    """
    from safetensors.torch import save_file

    from ppcl.common.files import atomic_path

    if to not in TO:
        raise UserError(f"to is {to!r}; expected one of {', '.join(TO)}")
    if to == "teacher":
        back, report = _back(Path(src), pipe_or_kept_blocks, component)
        with atomic_path(dst) as temporary:
            save_file(_storable(back), temporary, {"format": "pt"})
        return report
    strength = _check_source(src, None)
    tensors, header = _read(Path(src))
    record: Mapping[str, Sequence[Any]]
    if isinstance(pipe_or_kept_blocks, Mapping):
        record = pipe_or_kept_blocks
        out, report = remap_lora(tensors, record, runs=runs)
        adapter = remap_metadata(_metadata(header, src), _modules(report)) if METADATA_KEY in header else None
    else:
        record = pipeline_record(pipe_or_kept_blocks, component)["kept_blocks"]
        out, adapter, report = _bridge(pipe_or_kept_blocks, str(src), runs, {}, component=component)
    if adapter is not None:
        header[METADATA_KEY] = json.dumps(adapter)
    header[CONVERTED_KEY] = json.dumps(record)
    with atomic_path(dst) as temporary:
        save_file(_storable(out), temporary, header)
    return replace(report, strength=strength)


def _back(src: Path, pipe: Any, component: str) -> tuple[dict[str, Tensor], MappingReport]:
    """The tensors of a LoRA of the compressed pipeline under the teacher's names."""
    tensors, header = _read(src)
    adapter = _metadata(header, src) if METADATA_KEY in header else {}
    if any(_FOREIGN.match(key) for key in tensors):
        pipeline_record(pipe, component)
        tensors, found = _read_by_diffusers(pipe, str(src), {})
        adapter = found or {}
    return lora_for_teacher(tensors, adapter, pipe, component)


def _bridge(
    pipe: Any,
    source: str | Path | Mapping[str, Tensor],
    runs: str,
    options: Mapping[str, Any],
    how: str = "fold",
    component: str = TRANSFORMER,
) -> tuple[dict[str, Tensor], dict[str, Any] | None, MappingReport]:
    """Let diffusers read and convert a LoRA, rename it, and check that it fits a transformer of the pipeline."""
    record, transformer = pipeline_record(pipe, component), getattr(pipe, component)
    named, metadata = _read_by_diffusers(pipe, source, options)
    lists = [name for name, part in transformer.named_modules() if type(part).__name__ == "ModuleList"]
    smaller = smaller_modules(transformer.config)
    unpruned = [name for name in lists if name.split(".")[0] not in record["kept_blocks"]]
    out, report = remap_lora(
        named,
        record["kept_blocks"],
        runs=runs,
        starts=record.get("starts"),
        unpruned=unpruned,
        replaced=smaller,
        low_rank=low_rank_paths(smaller, named),
    )
    if all(_OTHER_COMPONENT.match(key) for key in named) and "text_encoder" not in pipe._lora_loadable_modules:
        raise UserError(
            f"this LoRA is for a text encoder alone (the first key is '{next(iter(named))}'), "
            f"and {type(pipe).__name__} loads LoRA into its transformer only"
        )
    folded, shares = fold(out, transformer)
    _check_fits(transformer, folded, report)
    if how == "widen":
        shares = dict.fromkeys(shares, 1.0)
    report = replace(report, folded=shares)
    modules = _modules(report)
    adapter = None if metadata is None else remap_metadata(metadata, modules, spell_out=bool(shares))
    return widen(out, transformer) if how == "widen" else folded, adapter, report


def _read_by_diffusers(
    pipe: Any, source: str | Path | Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Any]:
    """What diffusers makes of a LoRA for a pipeline, alphas included, as ``transformer.<module>``; and its metadata."""
    if not hasattr(pipe, "lora_state_dict"):
        raise ModelError(f"{type(pipe).__name__} cannot load LoRA; use the family's text-to-image pipeline")
    given = dict(source) if isinstance(source, Mapping) else str(source)
    asks_alphas = "return_alphas" in inspect.signature(pipe.lora_state_dict).parameters
    extra = {"return_alphas": True} if asks_alphas else {}
    options = {"use_safetensors": True, **options}  # others are pickles
    try:
        tensors, *alphas, metadata = pipe.lora_state_dict(given, return_lora_metadata=True, **extra, **options)
    except (ValueError, KeyError, OSError, RecursionError) as error:
        name = "these tensors" if isinstance(source, Mapping) else source
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"diffusers cannot read {name} as a LoRA for {type(pipe).__name__} ({reason}); "
            "check the path and that it was made for this family"
        ) from error
    together = {**tensors, **(alphas[0] if alphas and alphas[0] else {})}
    return {_component_name(key): tensor for key, tensor in together.items()}, metadata


def _parse(key: str, maps: Mapping[str, BlockMap], unpruned: Sequence[str]) -> tuple[str, str, int, str] | None:
    """Split a key into prefix, stack, block number and rest; None if it names no block."""
    stacks = "|".join(re.escape(stack) for stack in maps)
    match = re.match(rf"{_PREFIX}(?P<stack>{stacks})\.(?P<index>\d+)\.(?P<rest>.+)$", key)
    if match:
        return match["prefix"], match["stack"], int(match["index"]), match["rest"]
    bare = re.sub(rf"^{_PREFIX}", "", key)
    if _OTHER_COMPONENT.match(key) or any(bare.startswith(f"{path}.") for path in unpruned):
        return None
    like = _BLOCK_LIKE.search(key)
    if like:
        why = "was made for another family"
        if _FOREIGN.match(bare):
            why += ", or has names of another program, which load_lora, and convert_lora with the pipeline, can read"
        raise UserError(
            f"'{key}' names block {like['index']} of '{like['stack'].strip('_')}', but the transformer's blocks are in "
            f"{' and '.join(maps)}; the LoRA {why}"
        )
    return None


def _target(stack: BlockMap, name: str, index: int, runs: str) -> int | None:
    """Return the position to which the LoRA of teacher block ``index`` goes, None if it is dropped."""
    if index >= stack.num_teacher_blocks:
        raise UserError(
            f"the LoRA names block {index} of '{name}', but the teacher had {stack.num_teacher_blocks} "
            f"(0-{stack.num_teacher_blocks - 1}); it was made for another model"
        )
    position = stack.locate(index)
    if not stack.is_run(position):
        return position
    if runs == "drop":
        return None
    start = stack.start_index(position)
    if start is None:
        first, last = stack.spans[position]
        raise UserError(
            f"runs='start' needs the one block that the substitute for {name} {first}-{last} started from, "
            f"and the record says {stack.starts[position]!r}; use runs='drop', or export the pipeline again"
        )
    return position if index == start else None


def _component_name(key: str) -> str:
    """Bring PEFT's bare names, and names that diffusers' converter prefixed twice, to ``transformer.<module>``.

    diffusers skips what lacks the prefix; with it, a name that fits nothing is found out.
    """
    if _OTHER_COMPONENT.match(key):
        return key
    return "transformer." + re.sub(r"^(?:base_model\.model\.|transformer\.)+", "", key)


def _check_fits(transformer: Any, tensors: Mapping[str, Tensor], report: MappingReport) -> None:
    """Make sure that every module exists and that the matrices of the blocks have its shape."""
    modules = dict(transformer.named_modules())
    in_blocks = set(report.mapped.values())
    for key, tensor in tensors.items():
        if _OTHER_COMPONENT.match(key):
            continue
        name = _WEIGHT.sub("", key.removeprefix("transformer."))
        module = modules.get(name)
        whole_norm = "norm_" in name and ".lora_" not in key  # of FLUX control LoRA; diffusers loads them by itself
        fused = ".lokr_" in key and name.endswith(FUSED) and name.rpartition(".")[0] in modules
        if module is None and not whole_norm and not (fused and hasattr(transformer, "fuse_qkv_projections")):
            raise UserError(
                f"the LoRA has '{key}', but {type(transformer).__name__} has no module '{name}'; "
                "it was made for another family, or for a model whose blocks differ"
            )
        if key not in in_blocks or tensor.ndim != 2:  # outside of the blocks diffusers may widen a layer
            continue
        side, dimension = ("in_features", 1) if ".lora_A." in key else ("out_features", 0)
        expected = getattr(module, side, None)
        if expected is not None and tensor.shape[dimension] != expected and ".lora_" in key:
            raise UserError(
                f"'{key}' has {tensor.shape[dimension]} {side}, but the layer has {expected}; "
                "the LoRA was made for a model of another width"
            )


def _modules(report: MappingReport) -> dict[str, str]:
    """Return old and new module name of everything in a report that stayed in the transformer."""
    pairs = {**report.mapped, **{key: key for key in report.other if not _OTHER_COMPONENT.match(key)}}
    strip = re.compile(rf"^{_PREFIX}")
    return {strip.sub("", _WEIGHT.sub("", old)): strip.sub("", _WEIGHT.sub("", new)) for old, new in pairs.items()}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file with its whole metadata."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path} does not exist; expected the safetensors file of a LoRA")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); download or save it again") from None


def _metadata(header: Mapping[str, str], path: str | Path) -> Any:
    """What a LoRA's file says of its adapter."""
    try:
        return parse_json(header[METADATA_KEY])
    except ValueError as error:
        raise UserError(f"{path} says in {METADATA_KEY} what is not JSON ({error}); save it again") from None


def _check_source(source: str | Path, weight_name: str | None) -> str:
    """Look into a LoRA's local files before diffusers reads them.

    Returns:
        What decides its strength, see :func:`scaling_note`; empty for a hub id.

    Raises:
        UserError: :func:`convert_lora` wrote it, so its numbers would be moved twice; or it is a LoHa.
    """
    from safetensors import SafetensorError, safe_open

    path, notes = Path(source), []
    files = [path / weight_name] if weight_name else [path, *(path.glob("*.safetensors") if path.is_dir() else ())]
    for file in files:
        if not file.is_file():
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                header, keys = opened.metadata() or {}, list(opened.keys())
        except (SafetensorError, OSError):
            continue  # whoever reads it next says what is wrong with it
        if CONVERTED_KEY in header:
            raise UserError(
                f"{file} was already converted for a compressed model; load it with pipe.load_lora_weights, "
                "or start from the file made for the teacher"
            )
        _check_kind(keys, str(file))
        notes.append(scaling_note(keys, header))
    return notes[0] if len(notes) == 1 else ""  # of several files diffusers picks one


def _check_kind(keys: Collection[str], name: str) -> None:
    if any(".hada_" in key for key in keys):
        raise UserError(f"{name} is a LoHa, which diffusers does not read; convert it to an ordinary LoRA first")


def _storable(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors as safetensors wants them: contiguous, none of them shared, numbers as tensors."""
    import torch

    return {k: torch.as_tensor(v).detach().clone().contiguous() for k, v in tensors.items()}
