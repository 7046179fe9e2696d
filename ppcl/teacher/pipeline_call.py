"""How is a pipeline called? Its own signature and rules are asked; conventions of one family hold for no other.

What turns guidance off, which arguments a picture goes to, and what a call needs differ from pipeline to pipeline. What
goes wrong inside one is told in one line with its cause.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ppcl.config import CaptureConfig
from ppcl.config.names import PREFIX, TRANSFORMER
from ppcl.errors import ModelError, UserError
from ppcl.teacher.block_map import RECORD, is_call

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)
_FEW_STEPS = re.compile(r"turbo|schnell|lightning|distill|lcm|sprint|dmd|hyper-?sd|\d[-_ ]?steps?\b", re.IGNORECASE)
# all that diffusers' pipelines raise of themselves; our own hooks inside a call have other ways out
_FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
OFF = 1.0  # a guidance scale up to it means none, whatever the pipeline counts from
# what diffusers' pipelines call the picture beside a prompt, and those of them that take a list a prompt
PICTURES = ("image", "control_image", "cond_image", "images", "input_images")
_LISTS = ("images", "input_images")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_GIVEN = (
    *("self", "prompt", "negative_prompt", "generator", "num_inference_steps", "output_type", "height", "width"),
    *("num_frames", "guidance_scale", "true_cfg_scale"),
)
_WAY = (
    "set capture.data to captioned pictures (docs/data.md), and capture.source_column where the picture to start from "
    "is not the captioned one; or capture.sources to a text-to-image pipeline that draws pictures to start from"
)


class PicturedPrompt(str):
    """A prompt that brings the picture which its pipeline wants beside it; in all else its text.

    Attributes:
        name: Of the picture.
        picture: Reads it.
    """

    name: str
    picture: Callable[[], Image.Image]

    def __new__(cls, text: str, name: str, picture: Callable[[], Image.Image]) -> PicturedPrompt:
        """Join a text and its picture."""
        prompt = super().__new__(cls, text)
        prompt.name, prompt.picture = name, picture
        return prompt


def call_parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's call takes; of a class or of an object."""
    return inspect.signature(pipeline.__call__).parameters


@dataclass(frozen=True)
class Guidance:
    """How a pipeline is told of guidance.

    Attributes:
        argument: That carries the scale; empty where the call takes none.
        scale: What it is given; None for the pipeline's own default.
        doubles: Whether the transformer is then asked twice a step, with and without the prompt.
        default_doubles: Whether it is by the pipeline's own default.
    """

    argument: str
    scale: float | None
    doubles: bool
    default_doubles: bool


def guidance_of(kind: Any, transformer: Mapping[str, Any], config: Mapping[str, Any], asked: float | None) -> Guidance:
    """Find out how a pipeline is told of guidance, and what that makes of its transformer's calls.

    A transformer with ``guidance_embeds`` takes the scale as an input, and is asked once. Else the argument is
    ``true_cfg_scale`` or ``guidance_scale``, and the pipeline's own rule says from which scale on it asks twice.

    Args:
        kind: The pipeline, or its class.
        transformer: The transformer's config.
        config: The pipeline's.
        asked: ``capture.guidance_scale``.
    """
    parameters = call_parameters(kind)
    is_input = bool(transformer.get("guidance_embeds"))
    names = ["true_cfg_scale", "guidance_scale"]
    names = ["distilled_guidance_scale", "guidance_scale"] if is_input else names
    argument = next((name for name in names if name in parameters), "")
    if not argument:  # some have a component that guides
        guides = not is_input and "guider" in inspect.signature(kind.__init__).parameters
        return Guidance("", None, guides, guides)
    if is_input:
        return Guidance(argument, asked, False, False)
    default = parameters[argument].default

    def doubles(scale: Any) -> bool:
        if not isinstance(scale, int | float):
            return False
        if argument == "true_cfg_scale":
            return scale > OFF
        rule = getattr(kind if isinstance(kind, type) else type(kind), "do_classifier_free_guidance", None)
        try:
            pipeline = SimpleNamespace(_guidance_scale=scale, guidance_scale=scale, config=SimpleNamespace(**config))
            return bool(rule.fget(pipeline))  # type: ignore[union-attr]
        except (AttributeError, TypeError):  # no such rule, or one that looks at more than the scale
            return scale > OFF

    if asked is not None and asked <= OFF:
        asked = next((scale for scale in (OFF, 0.0) if not doubles(scale)), OFF)
    if "guidance_schedule" in parameters and asked is None:  # one scale for each of the default steps
        asked = float(max(parameters["guidance_schedule"].default))
    return Guidance(argument, asked, doubles(default if asked is None else asked), doubles(default))


def _guidance(pipeline: Any, settings: CaptureConfig) -> Guidance:
    config = getattr(pipeline, "config", {})
    return guidance_of(pipeline, pipeline.transformer.config, config, settings.guidance_scale)


def guidance_weight(pipeline: Any, settings: CaptureConfig) -> float | None:
    """The scale w of v_u + w (v_c - v_u), as a pipeline draws with these settings; None without guidance.

    A pipeline that is still asked twice at a scale of 1 counts from 0.
    """
    guidance = _guidance(pipeline, settings)
    if not (guidance.argument and guidance.doubles):
        return None
    scale = guidance.scale
    if scale is None:
        scale = call_parameters(pipeline)[guidance.argument].default
    config = getattr(pipeline, "config", {})
    from_zero = guidance_of(pipeline, pipeline.transformer.config, config, OFF).scale == 0
    return float(scale) + from_zero


def guidance_arguments(pipeline: Any, settings: CaptureConfig) -> dict[str, Any]:
    """Name the guidance and size arguments as this pipeline wants them (frames too, if it draws videos)."""
    accepted, guidance = call_parameters(pipeline), _guidance(pipeline, settings)
    arguments: dict[str, Any] = {name: getattr(settings, name) for name in ("height", "width", "num_frames")}
    if guidance.argument:
        arguments[guidance.argument] = guidance.scale
    if guidance.doubles:
        arguments["negative_prompt"] = settings.negative_prompt
    if settings.height and settings.width:  # FLUX Kontext has an area instead of a size
        arguments |= {"max_area": settings.height * settings.width, "_auto_resize": False}
    return {name: value for name, value in arguments.items() if value is not None and name in accepted}


def without_guidance(pipeline: Any, settings: CaptureConfig) -> CaptureConfig:
    """Settings under which a pipeline asks its transformer once a step; a scale that is an input stays."""
    return settings.model_copy(update={"guidance_scale": OFF}) if _guidance(pipeline, settings).doubles else settings


def own_call(pipeline: Any) -> dict[str, int | float]:
    """Steps and guidance that a compressed pipeline was trained to be called with; empty if any will do.

    Raises:
        ModelError: Its config says something else there.
    """
    record = getattr(getattr(pipeline, "transformer", None), "config", {}).get(RECORD)
    call = record.get("call") if isinstance(record, Mapping) else None
    if call and not is_call(call):
        raise ModelError(
            f"'{RECORD}.call' in the transformer's config is {str(call)[:100]}, expected num_inference_steps and a "
            "guidance scale; export the model again"
        )
    return dict(call or {})


def check_guidance(pipeline: Any, settings: CaptureConfig) -> None:
    """Warn of guidance that a few-step teacher was made to do without, or that a pipeline takes no notice of."""
    guidance, name = _guidance(pipeline, settings), type(pipeline).__name__
    asked = settings.guidance_scale
    if asked is not None and not guidance.argument:
        logger.warning("%s takes no guidance scale; capture.guidance_scale=%g has no effect", name, asked)
    if not (guidance.argument and guidance.doubles):
        return
    places = (getattr(part, "config", {}).get("_name_or_path") for part in (pipeline, pipeline.transformer))
    words = " ".join("/".join(Path(str(place)).parts[-2:]) for place in places if place)
    is_distilled = getattr(pipeline, "config", {}).get("is_distilled")
    if not guidance.default_doubles or is_distilled or _FEW_STEPS.search(words) or own_call(pipeline):
        logger.warning(
            "%s seems to be made for drawing without guidance, in few steps, and is asked twice a step here; set "
            "capture.guidance_scale=0 and capture.num_inference_steps to what its card says",
            name,
        )


def picture_arguments(kind: Any) -> list[str]:
    """The arguments of a pipeline's call that a picture goes to, and its mask; empty where it draws from texts alone.

    Args:
        kind: The pipeline, or its class.
    """
    accepted = call_parameters(kind)
    found = next((name for name in PICTURES if name in accepted), None)
    return [] if found is None else [found, *(name for name in ("mask_image",) if name in accepted)]


def needs_of(kind: type) -> str:
    """What a class of pipelines wants beside prompts, and where it can be had; empty if nothing."""
    try:
        check_call(kind, False)
    except ModelError as error:
        return str(error)
    pictures = picture_arguments(kind)
    return f"{kind.__name__} takes a picture beside each prompt ({', '.join(pictures)}): {_WAY}" if pictures else ""


def check_call(pipeline: Any, pictured: bool) -> None:
    """Refuse a pipeline that wants more than prompts and a picture, or a picture that it will not get.

    Args:
        pipeline: Or its class.
        pictured: Whether its prompts bring pictures.

    Raises:
        ModelError: It does.
    """
    name = (pipeline if isinstance(pipeline, type) else type(pipeline)).__name__
    pictures, parameters = picture_arguments(pipeline), call_parameters(pipeline)
    named = {key: parameter for key, parameter in parameters.items() if parameter.kind in _NAMED}
    if "prompt" not in named and len(named) == len(parameters):
        raise ModelError(f"{name} takes no prompt; give a pipeline that draws from one")
    needed = [key for key, p in named.items() if p.default is p.empty and key not in _GIVEN]
    if others := [key for key in needed if key not in pictures]:
        raise ModelError(
            f"{name} cannot be called without {', '.join(others)}; ppcl gives a prompt and a picture of capture.data"
        )
    if needed and not pictured:
        raise ModelError(f"{name} starts from a picture beside each prompt ({', '.join(needed)}): {_WAY}")


def beside(pipeline: Any, prompt: PicturedPrompt, size: tuple[int, int] | None) -> dict[str, Any]:
    """The arguments that a prompt's picture makes.

    Args:
        pipeline: Its call names them.
        prompt: See :class:`PicturedPrompt`.
        size: (height, width) that the picture is cut to; its own if None.
    """
    from PIL import ImageOps

    picture = prompt.picture()
    if size is not None:
        picture = ImageOps.fit(picture, (size[1], size[0]))
    arguments: dict[str, Any] = {}
    for name in picture_arguments(pipeline):
        arguments[name] = _mask(picture.size, prompt) if name == "mask_image" else picture
        if name in _LISTS:
            arguments[name] = [[picture]]
    return arguments


def _mask(size: tuple[int, int], text: str) -> Image.Image:
    """A white box of half the sides, which is drawn anew; where it lies is the text's matter."""
    from PIL import Image

    width, height = size
    left, top = (sum(text.encode()[start::2]) % 5 for start in (0, 1))
    mask = Image.new("L", size, 0)
    x, y = left * width // 8, top * height // 8
    mask.paste(255, (x, y, x + width // 2, y + height // 2))
    return mask


def call_pipeline(
    pipeline: Any,
    prompts: Sequence[str],
    remedy: str = "mend the settings of capture, or give the pipeline another scheduler",
    **arguments: Any,
) -> Any:
    """Call a pipeline on a batch of prompts, repeating the negative prompt for each.

    Args:
        pipeline: Any diffusers pipeline.
        prompts: The batch; of one prompt if it brings a picture.
        remedy: What a user can do if the call fails.
        arguments: Of the call.

    Raises:
        ModelError: The pipeline raises anything.
    """
    if isinstance(arguments.get("negative_prompt"), str):
        # pipelines encode a string as a batch of one, which does not fit a batch of prompts
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    if arguments.get("guidance_scale") is not None and "guidance_schedule" in call_parameters(pipeline):
        arguments["guidance_schedule"] = None  # Ideogram's has one scale for each of its default steps
    if isinstance(prompts[0], PicturedPrompt):
        height, width = arguments.get("height"), arguments.get("width")
        arguments |= beside(pipeline, prompts[0], (height, width) if height and width else None)
    elif (pictures := picture_arguments(pipeline)) and not set(pictures) & set(arguments):
        remedy = f"it takes a picture beside each prompt ({', '.join(pictures)}): {_WAY}"
    with told_in_one_line(pipeline, remedy):
        return pipeline(prompt=[str(prompt) for prompt in prompts], **arguments)


@contextlib.contextmanager
def told_in_one_line(pipeline: Any, remedy: str) -> Iterator[None]:
    """Turn whatever a pipeline raises into one line: what, its cause, and what can be done."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except _FAILURES as error:
        cause = (str(error).strip().splitlines() or [""])[0][:300]
        sampler = type(getattr(pipeline, "scheduler", None)).__name__
        raise ModelError(
            f"{type(pipeline).__name__} with {sampler} failed ({type(error).__name__}: {cause}); {remedy}"
        ) from error


def other_transformers(pipeline: Any, component: str = TRANSFORMER) -> list[str]:
    """Names of a pipeline's transformers beside one: Wan 2.2 has one for much noise and one for little."""
    parts = {n: p for n, p in getattr(pipeline, "components", {}).items() if isinstance(p, nn.Module)}
    name = stock_name(parts[component]) if component in parts else None
    return [n for n, part in parts.items() if n != component and stock_name(part) == name]


def stock_name(transformer: nn.Module) -> str:
    """Name of a transformer's class, of one with smaller modules that of the stock one."""
    return type(transformer).__name__.removeprefix(PREFIX)
