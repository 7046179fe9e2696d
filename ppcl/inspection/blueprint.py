"""A transformer without weights: built on the meta device from its config file, and called there.

A pipeline's plan depends on shapes alone, so a user can look at one before fetching 40 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.files import read_mapping
from ppcl.common.hooks import removing
from ppcl.config.names import BOTH, TRANSFORMER
from ppcl.errors import ModelError, UserError
from ppcl.modules.compressed import register
from ppcl.teacher.families import ADAPTERS, adapter_class, adapter_for
from ppcl.teacher.loading import EMBEDDED, check_config, check_folder, check_model, model_path, two_transformers

VAE_FILE = "vae/config.json"
MOST_VAE_LEVELS = 10
DEFAULT_VAE_SCALE = 8  # of the published models of the families below
# Pipelines pad to 512 (FLUX, Wan) or to 77 of CLIP and 256 of T5 (SD3); Qwen-Image and Z-Image take as many as the
# prompt has: a hundred words
DEFAULT_TEXT_TOKENS = {
    "FluxTransformer2DModel": 512,
    "QwenImageTransformer2DModel": 128,
    "SD3Transformer2DModel": 333,
    "WanTransformer3DModel": 512,
    "ZImageTransformer2DModel": 128,
}


def transformers_of(model: str, component: str) -> list[str]:
    """Names of the transformers that are meant: one, or of ``both`` the two that the pipeline has.

    Raises:
        ModelError: It has not two.
    """
    if component != BOTH:
        return [component]
    read_config(model)  # which fetches the index, too
    return two_transformers(model)


def read_config(model: str, component: str = TRANSFORMER) -> tuple[dict[str, Any], int]:
    """Read a transformer's config and the scale of the VAE beside it; no weights are touched.

    Args:
        model: ``emoji``, a pipeline folder, a transformer folder, its config.json, or a hub id.
        component: Which transformer of a pipeline.

    Returns:
        The config, and how many pixels of height one latent row stands for (8 where no VAE is beside it).

    Raises:
        ModelError: There is no such config, or it is not one of a diffusers model.
    """
    place, config_file = Path(model_path(model)), f"{component}/config.json"
    if place.is_file() or place.suffix == ".json":
        config_path: Path | None = place
        vae_path: Path | None = place.parent.parent / VAE_FILE
    elif place.is_dir():
        bare = (place / "config.json").is_file() and not (place / config_file).is_file()
        if (place / "model_index.json").is_file() and not (place / config_file).is_file():
            check_folder(place, component)  # says it better where the pipeline has no transformer at all
        config_path, vae_path = (place / "config.json", None) if bare else (place / config_file, place / VAE_FILE)
    else:
        check_model(model)
        config_path = _fetch(model, config_file)
        vae_path = _fetch(model, VAE_FILE, required=False)
        _fetch(model, "model_index.json", required=False)  # for what asks which class of pipeline it is
    if config_path is None:
        raise AssertionError("a required file is there or an error")
    if not config_path.exists():
        raise ModelError(
            f"{config_path} does not exist; give a pipeline folder (with {config_file}), a transformer folder, "
            f"a transformer's config.json, a hub id, or an embedded model ({', '.join(EMBEDDED)})"
        )
    config = read_mapping(config_path, ModelError, "fetch it again")
    check_config(config, config_path)
    if not isinstance(config.get("_class_name"), str):
        raise ModelError(
            f"{config_path} names no _class_name, so it is not the config of a diffusers model; "
            "give a pipeline folder, or its transformer/config.json"
        )
    vae = read_mapping(vae_path, ModelError, "fetch it again") if vae_path is not None and vae_path.is_file() else {}
    return config, _vae_scale(vae)


def _fetch(repository: str, name: str, required: bool = True) -> Path | None:
    """Fetch one small file of a hub repository, or find it in the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError, EntryNotFoundError) as error:
        if not required:
            return None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        remedy = "check the name and the network, or give a folder"
        if isinstance(error, GatedRepoError):
            remedy = "accept the model's licence on the hub and log in with `hf auth login`"
        raise ModelError(f"{name} of {repository!r} cannot be fetched ({reason[:200]}); {remedy}") from None


def _vae_scale(config: dict[str, Any]) -> int:
    """Pixels a latent row, as the families' pipelines derive it from the VAE's config."""
    for key, extra in (("temperal_downsample", 0), ("block_out_channels", 1)):
        if isinstance(config.get(key), list) and len(config[key]) <= MOST_VAE_LEVELS:
            return int(2 ** (len(config[key]) - extra))
    return DEFAULT_VAE_SCALE


def build_on_meta(config: dict[str, Any]) -> Any:
    """Build a transformer on the meta device: all shapes, no memory.

    Args:
        config: What :func:`read_config` returned.

    Raises:
        ModelError: diffusers does not know the class, it is not supported, or the values do not fit together.
    """
    import diffusers

    register(ADAPTERS)
    name = config["_class_name"]
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_config"):
        raise ModelError(
            f"diffusers {diffusers.__version__} knows no class {name!r}; upgrade diffusers, or check _class_name"
        )
    if not issubclass(kind, nn.Module):
        raise ModelError(f"{name} is not a model; give a pipeline folder, or its transformer/config.json")
    adapter = adapter_class(kind)
    try:
        with torch.device("meta"):
            transformer = kind.from_config(config).eval().requires_grad_(False)  # type: ignore[attr-defined]
    except Exception as error:  # whatever a family's constructor raises for values that do not fit together
        raise ModelError(_unfit(name, error)) from None
    for spec in adapter.stacks:
        if not len(adapter.blocks(transformer, spec)):
            raise ModelError(f"the config of {name} has {spec.count_field} = 0: there is no block to remove")
    return transformer


def _unfit(name: str, error: Exception) -> str:
    lines = str(error).splitlines()
    reason = lines[0][:200] if lines else type(error).__name__
    return f"the values in the config of {name} do not fit together ({reason}); fetch it again"


def _qwen_image(config: Any, grid: tuple[int, int], text_tokens: int) -> dict[str, Any] | None:
    if config.get("use_additional_t_cond") or config.get("use_layer3d_rope"):
        return None  # the layered variant takes several pictures a call
    return {
        "hidden_states": _meta(1, grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": _meta(1, text_tokens, config.joint_attention_dim),
        "timestep": _meta(1),
        "img_shapes": [[(1, *grid)]],
    }


def _flux(config: Any, grid: tuple[int, int], text_tokens: int) -> dict[str, Any] | None:
    tokens = grid[0] * grid[1]
    return {
        "hidden_states": _meta(1, tokens, config.in_channels),
        "encoder_hidden_states": _meta(1, text_tokens, config.joint_attention_dim),
        "pooled_projections": _meta(1, config.pooled_projection_dim),
        "timestep": _meta(1),
        "img_ids": _meta(tokens, 3),
        "txt_ids": _meta(text_tokens, 3),
        "guidance": _meta(1) if config.guidance_embeds else None,
    }


def _sd3(config: Any, grid: tuple[int, int], text_tokens: int) -> dict[str, Any] | None:
    patch = config.patch_size
    return {
        "hidden_states": _meta(1, config.in_channels, grid[0] * patch, grid[1] * patch),
        "encoder_hidden_states": _meta(1, text_tokens, config.joint_attention_dim),
        "pooled_projections": _meta(1, config.pooled_projection_dim),
        "timestep": _meta(1),
    }


def _wan(config: Any, grid: tuple[int, int], text_tokens: int, latent_frames: int = 1) -> dict[str, Any] | None:
    """A video, of one frame where nothing is said: what a picture costs."""
    if config.image_dim or config.in_channels != config.out_channels:
        return None  # image-to-video: takes a picture too
    frames, rows, columns = config.patch_size
    return {
        "hidden_states": _meta(1, config.in_channels, frames * latent_frames, grid[0] * rows, grid[1] * columns),
        "timestep": _meta(1),
        "encoder_hidden_states": _meta(1, text_tokens, config.text_dim),
    }


def _z_image(config: Any, grid: tuple[int, int], text_tokens: int) -> dict[str, Any] | None:
    if config.get("siglip_feat_dim"):
        return None  # the variant that also takes pictures
    patch, frames = config.all_patch_size[0], config.all_f_patch_size[0]
    return {
        "x": [_meta(config.in_channels, frames, grid[0] * patch, grid[1] * patch)],
        "t": _meta(1),
        "cap_feats": [_meta(text_tokens, config.cap_feat_dim)],
        "patch_size": patch,
        "f_patch_size": frames,
    }


CALLS: dict[str, Callable[[Any, tuple[int, int], int], dict[str, Any] | None]] = {
    "QwenImageTransformer2DModel": _qwen_image,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
    "ZImageTransformer2DModel": _z_image,
}


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def token_grid(height: int, width: int, vae_scale: int) -> tuple[int, int]:
    """Rows and columns of image tokens: a token is 2 x 2 latents, a picture is cut to whole tokens.

    Args:
        height: Of the picture, pixels.
        width: Likewise.
        vae_scale: Pixels a latent row.

    Raises:
        UserError: The picture is smaller than one token.
    """
    step = 2 * vae_scale
    if height < step or width < step:
        raise UserError(f"--height {height} --width {width}: a picture has at least {step} x {step} pixels here")
    return height // step, width // step


def example_call(
    transformer: Any, grid: tuple[int, int], text_tokens: int | None = None, latent_frames: int = 1
) -> dict[str, Any] | None:
    """Arguments of one call for one picture, on the meta device.

    Args:
        transformer: From :func:`build_on_meta`.
        grid: Rows and columns of image tokens.
        text_tokens: Tokens of the prompt; what is usual for the family if None.
        latent_frames: Of a video; families of pictures do not read it.

    Returns:
        The named arguments, or None where the family has no builder.
    """
    name = _family(transformer)
    if name is None:
        return None
    tokens = text_tokens or DEFAULT_TEXT_TOKENS[name]
    if CALLS[name] is _wan:
        return _wan(transformer.config, grid, tokens, latent_frames)
    return CALLS[name](transformer.config, grid, tokens)


def usual_text_tokens(transformer: Any) -> int:
    """Tokens of a prompt as the family's pipeline gives them.

    Raises:
        KeyError: The family has no builder of calls.
    """
    return DEFAULT_TEXT_TOKENS[_family(transformer) or ""]


def _family(transformer: Any) -> str | None:
    return next((kind.__name__ for kind in type(transformer).__mro__ if kind.__name__ in CALLS), None)


def flops_on_meta(transformer: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Count the FLOPs of a call without computing anything, see :func:`ppcl.teacher.flops.count_flops`.

    Of blocks that are alike only the first is run, since even shapes alone take seconds for sixty blocks.

    Raises:
        ModelError: The shapes in the config do not fit together.
    """
    from ppcl.teacher.flops import count_flops

    adapter = adapter_for(transformer)
    stacks = {spec.name: list(adapter.blocks(transformer, spec)) for spec in adapter.stacks}
    twins = {name: _twins(blocks) for name, blocks in stacks.items()}
    try:
        with ExitStack() as changes:
            for name, blocks in stacks.items():
                changes.enter_context(_first_alone(blocks, twins[name]))
            counted = count_flops(transformer, stacks, lambda: transformer(**arguments, return_dict=False), 1)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(_unfit(type(transformer).__name__, error)) from None
    for name, of_blocks in counted["stacks"].items():
        counted["total"] += sum(of_blocks[first] for index, first in enumerate(twins[name]) if first != index)
        counted["stacks"][name] = [of_blocks[first] for first in twins[name]]
    return counted


@contextmanager
def _first_alone(blocks: list[nn.Module], twins: list[int]) -> Iterator[None]:
    """Let a block that has a twin before it return what the twin returned."""
    outputs: dict[int, Any] = {}
    copies = [(block, first) for index, (block, first) in enumerate(zip(blocks, twins, strict=True)) if first != index]

    def keep(first: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.update({first: output})

    for block, first in copies:
        block.forward = lambda *_args, _first=first, **_kwargs: outputs[_first]  # type: ignore[method-assign]
    try:
        with removing(blocks[first].register_forward_hook(keep(first)) for first in set(twins)):
            yield
    finally:
        for block, _ in copies:
            del block.forward


def _twins(blocks: list[nn.Module]) -> list[int]:
    """For each block the first one of the same modules, shapes and settings."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(_likeness(block), index) for index, block in enumerate(blocks)]


def _likeness(block: nn.Module) -> tuple[Any, ...]:
    """What the cost of a block depends on."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    kinds = tuple(
        (name, type(module), *((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, int | float | str)))
        for name, module in block.named_modules()
    )
    return shapes, kinds
