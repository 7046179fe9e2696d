"""A LoRA trained on a compressed transformer, for the teacher: so that one LoRA serves both.

A block that was kept gets its number of before. What was trained on a substitute means nothing to the blocks that it
stands for and is left out. In modules that keep some of their units the others get no update; a layer of low rank,
y = up(down(x)) with a LoRA on either, gets the update of the product, exactly:

    (up + B2 A2) (down + B1 A1) - up down = ((up + B2 A2) B1) A1 + B2 (A2 down)

Strength (alpha over rank, by the file's metadata or its alphas) is multiplied into B, for ranks change here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ppcl.config.names import TRANSFORMER
from ppcl.errors import UserError
from ppcl.modules.parts import SLICED, cuts_of
from ppcl.pipelines.lora_low_rank import plain_weight
from ppcl.pipelines.lora_report import MappingReport
from ppcl.teacher.block_map import BlockMap, block_maps, pipeline_record, smaller_modules

if TYPE_CHECKING:
    from torch import Tensor

LOW_RANK = "low_rank"
Factors = tuple["Tensor", "Tensor"]  # A (k, d) and B (o, k): the update is B A
_FACTOR = re.compile(
    r"^(?P<prefix>(?:base_model\.model\.)?(?:transformer\.)?)(?P<module>.+)\.lora_(?P<side>A|B)(?:\.\w+)?\.weight$"
)


def lora_for_teacher(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], pipe: Any, component: str = TRANSFORMER
) -> tuple[dict[str, Tensor], MappingReport]:
    """Rename and enlarge a LoRA of a compressed pipeline's transformer.

    Args:
        tensors: ``transformer.<module>.lora_A.weight`` and ``lora_B``, as PEFT and diffusers save them, and alphas.
        metadata: The adapter's, as diffusers stores it; empty without any.
        pipe: The compressed pipeline.
        component: Which transformer of it.

    Returns:
        The teacher's LoRA with alpha = rank, and what became of each tensor.

    Raises:
        UserError: It is of another form (DoRA, LoKr, kohya's names), of another model, or nothing is left.
        ModelError: The pipeline was not compressed by ppcl, or weights that are asked for are not in memory.
    """
    maps, transformer = block_maps(pipeline_record(pipe, component)["kept_blocks"]), getattr(pipe, component)
    pruning = smaller_modules(transformer.config)
    pairs = _pairs(tensors, metadata)
    _check(pairs, transformer)
    out: dict[str, Tensor] = {}
    mapped: dict[str, str] = {}
    dropped: list[str] = []
    other: list[str] = []
    moved: dict[str, str] = {}
    lost: dict[str, None] = {}
    for name, factors in pairs.items():
        path = max((path for path in pruning if f"{name}.".startswith(f"{path}.")), key=len, default="")
        kind = pruning[path]["kind"] if path else ""
        old = path if kind == LOW_RANK else name
        block, new = _named_as_in_teacher(old, maps)
        keys = [_key(name, side) for side in "AB"]
        if new is None or kind not in ("", LOW_RANK, *SLICED):
            dropped += keys
            lost[block if new is None else path] = None
            continue
        if kind == LOW_RANK:
            factors = _product(transformer.get_submodule(path), path, pairs)
        elif kind:
            factors = scattered(factors, name.removeprefix(f"{path}."), pruning[path])
        out |= {_key(new, side): factor.contiguous() for side, factor in zip("AB", factors, strict=True)}
        if block:
            mapped |= {key: _key(new, side) for key, side in zip(keys, "AB", strict=True)}
            moved[block] = new[: new.index(".", len(block.rpartition(".")[0]) + 1)]
        else:
            other += keys
    if not out:
        raise UserError("nothing of this LoRA is left: it was trained on substitutes and replaced modules alone")
    return out, MappingReport(mapped, tuple(dropped), tuple(other), tuple(moved.items()), tuple(lost))


def _key(module: str, side: str) -> str:
    return f"transformer.{module}.lora_{side}.weight"


def _named_as_in_teacher(name: str, maps: Mapping[str, BlockMap]) -> tuple[str, str | None]:
    """The block of the student that a module is in (empty outside of all), and the module's name in the teacher.

    The name is None where the block is a substitute.
    """
    stack, number, inside = ([*name.split(".", 2), "", ""])[:3]
    if stack not in maps or not number.isdecimal():
        return "", name
    spans = maps[stack].spans
    if int(number) >= len(spans):
        raise UserError(
            f"the LoRA names block {number} of '{stack}', and the compressed model has {len(spans)}; it was not "
            "trained on this one"
        )
    first, last = spans[int(number)]
    return f"{stack}.{number}", f"{stack}.{first}.{inside}" if first == last else None


def _pairs(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Factors]:
    """The factors of each module's LoRA, with its strength in B."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.match(key)
        if match:
            found.setdefault(match["module"], {})[match["side"]] = tensor
        elif not key.endswith(".alpha"):
            raise UserError(
                f"the LoRA has '{key}', and what goes back to the teacher is lora_A and lora_B of the transformer's "
                "modules; save it with diffusers' save_lora_weights, without DoRA"
            )
    if not found or any(set(sides) != {"A", "B"} for sides in found.values()):
        raise UserError("this LoRA is not whole: each module has a lora_A and a lora_B; save it again")
    alphas = {
        key.removesuffix(".alpha").removeprefix("transformer."): float(t) for key, t in tensors.items() if t.ndim == 0
    }
    pairs = {}
    for name, sides in found.items():
        rank = sides["A"].shape[0]
        strength = alphas[name] / rank if name in alphas else _strength(name, rank, metadata)
        pairs[name] = sides["A"], strength * sides["B"]
    return pairs


def _strength(name: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """Alpha over rank, as PEFT takes them from an adapter's config; 1 without one."""
    config = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    if not config:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    own = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
    alpha = float(patterns[own] if own is not None else config.get("lora_alpha", rank))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _check(pairs: Mapping[str, Factors], transformer: Any) -> None:
    """Refuse a LoRA that was not trained on this transformer."""
    modules = dict(transformer.named_modules())
    for name, (a, b) in pairs.items():
        layer = modules.get(name)
        sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
        if layer is None or sizes != (a.shape[1], b.shape[0]):
            what = f"whose features are {sizes}" if layer is not None else "which it does not have"
            raise UserError(
                f"the LoRA has {a.shape[1]} and {b.shape[0]} features for '{name}', {what}; it was not trained on this "
                "compressed pipeline"
            )


def _product(layer: Any, path: str, pairs: Mapping[str, Factors]) -> Factors:
    """The update of a layer of low rank as a whole, see the module's text."""
    import torch

    up, down = (plain_weight(part.weight.detach(), path).float() for part in (layer.up, layer.down))
    factors = []
    if f"{path}.up" in pairs:
        a, b = pairs[f"{path}.up"]
        factors.append((a.float() @ down, b.float()))
        up = up + b.float() @ a.float()
    if f"{path}.down" in pairs:
        a, b = pairs[f"{path}.down"]
        factors.append((a.float(), up @ b.float()))
    dtype = next(iter(pairs.values()))[0].dtype
    return torch.cat([a for a, _ in factors]).to(dtype), torch.cat([b for _, b in factors], 1).to(dtype)


def scattered(factors: Factors, name: str, part: Mapping[str, Any]) -> Factors:
    """The update of a layer with all units: nothing where units are gone.

    Args:
        factors: Of the layer as it is.
        name: Its path inside the module that was cut.
        part: The module's entry in the config's ``pruning``.
    """
    from ppcl.modules.slicing import kept_features

    a, b = factors
    if whole := _features_before(part, "rows", name, b.shape[0]):
        b = b.new_zeros(whole, b.shape[1]).index_copy(0, kept_features(part, whole, name), b)
    if whole := _features_before(part, "columns", name, a.shape[1]):
        a = a.new_zeros(a.shape[0], whole).index_copy(1, kept_features(part, whole, name), a)
    return a, b


def _features_before(part: Mapping[str, Any], side: str, name: str, left: int) -> int:
    """Features that a layer had before units were cut out of it; 0 where nothing was on this side."""
    before = 0
    for cut in cuts_of(part):
        if name in cut[side]:
            gone, spans = cut["of"] - cut["size"], cut.get("spans", {}).get(name)
            share = sum(share for _, share in spans) if spans else left // cut["size"]
            before = (before or left) + gone * share
    return before
