"""What the cost of a run depends on, counted from a config: sizes, FLOPs, and what a block's calls allocate.

No weight is read and no number computed: FLOPs are counted on meta tensors, memory on fake ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ppcl.common.devices import autocast
from ppcl.config.names import PREFIX, TRANSFORMER
from ppcl.distill.fake import bare_copy, fake_tree, simulated_peak
from ppcl.distill.memory import local_step_bytes
from ppcl.errors import ModelError
from ppcl.inspection.blueprint import build_on_meta, example_call, flops_on_meta, read_config, token_grid
from ppcl.modules.slicing import is_matrix, matrix_of, neurons_of
from ppcl.student.assembly import with_blocks
from ppcl.teacher.blocks import loaded_bytes
from ppcl.teacher.call_arguments import to_dtype
from ppcl.teacher.calls import velocity
from ppcl.teacher.description import describe
from ppcl.teacher.families import Adapter, StackSpec, adapter_for
from ppcl.teacher.flops import count_params
from ppcl.teacher.loading import stored_dtype
from ppcl.teacher.model_info import ModelInfo
from ppcl.teacher.trace import BlockCall, run_traced

# Numbers of the published pipelines' text encoders and VAE, for models whose files are not here
TEXT_NUMBERS = {
    "FluxTransformer2DModel": 4.89e9,  # T5-XXL and CLIP-L
    "QwenImageTransformer2DModel": 8.29e9,  # Qwen2.5-VL-7B
    "SD3Transformer2DModel": 5.58e9,  # T5-XXL, CLIP-L and CLIP-G
    "WanTransformer3DModel": 5.68e9,  # UMT5-XXL
    "ZImageTransformer2DModel": 4.02e9,  # Qwen3-4B
}
VAE_NUMBERS = 0.13e9
JOINED = ("SD3Transformer2DModel", "ZImageTransformer2DModel")  # guidance doubles the batch, not the calls
# Bytes a pixel of decoding, counted on fake tensors of AutoencoderKLQwenImage and of FLUX.1's AutoencoderKL; a video
# goes four frames at a time
DECODE = {"QwenImageTransformer2DModel": 3500, "WanTransformer3DModel": 14_000}
DECODE_OTHERS = 1600
FRAMES = {"WanTransformer3DModel": 81}  # that the pipeline draws
FRAME_SCALE = 4  # frames a latent one


@dataclass(frozen=True)
class Part:
    """The blocks of one stack, which are alike enough.

    Attributes:
        count: How many.
        params: Of the largest.
        flops: Of one, for one state.
        streams: Features of each stream that a block changes.
        networks: Features of each feed-forward network's input.
        hidden: Neurons and outputs of each feed-forward network that can lose some.
        text: Features of the text input of the attention; 0 where it is not looked at.
        modulation: Outputs and inputs of each modulation layer.
    """

    count: int
    params: int
    flops: int
    streams: tuple[int, ...]
    networks: tuple[int, ...]
    hidden: tuple[tuple[int, int], ...]
    text: int
    modulation: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shapes:
    """What is known of a model and of one state.

    Attributes:
        info: The planner's view, with FLOPs of one state.
        parts: The stacks.
        itemsize: Bytes of a weight, and of a number of a state.
        tokens: Of one state, all streams together.
        state: Numbers of a state between two blocks.
        record: Bytes of a recorded state: arguments and velocity.
        decode: Bytes that the VAE allocates for a picture.
        forward: Bytes that a call of one state allocates, beyond weights, one block at a time.
        backward: Likewise with what gradients of the states need of a block.
        step: Likewise a training step of one substitute: on one state; on more a part that stays, and a state's.
        text: Bytes of the text encoders.
        vae: Bytes of the VAE.
        files_here: Whether the pipeline's files are here, so that these two were read off them.
        joined: Guidance doubles the batch of a call, not the calls.
    """

    info: ModelInfo
    parts: tuple[Part, ...]
    itemsize: int
    tokens: int
    state: int
    record: int
    decode: int
    forward: int
    backward: int
    step: tuple[int, int, int]
    text: float
    vae: float
    files_here: bool
    joined: bool

    @property
    def blocks(self) -> int:
        """Blocks of all stacks."""
        return sum(part.count for part in self.parts)

    @property
    def in_blocks(self) -> int:
        """Bytes of all blocks' weights."""
        return self.itemsize * sum(sum(stack.block_params) for stack in self.info.stacks)

    @property
    def outside(self) -> int:
        """Bytes of the transformer's other weights."""
        return self.itemsize * self.info.params - self.in_blocks

    @property
    def block(self) -> int:
        """Bytes of the largest block's weights."""
        return self.itemsize * max(part.params for part in self.parts)

    @property
    def state_bytes(self) -> int:
        """Bytes of a state between two blocks."""
        return self.itemsize * self.state

    def step_bytes(self, states: int) -> int:
        """Bytes that a training step of one substitute allocates on so many states."""
        return max(self.step[0], self.step[1] + states * self.step[2])


@dataclass(frozen=True)
class Blueprint:
    """A transformer on the meta device, a call of it for one state, and what was counted of both."""

    transformer: Any
    adapter: Adapter
    arguments: dict[str, Any]
    shapes: Shapes


def blueprint_of(
    model: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    text_tokens: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    component: str = TRANSFORMER,
) -> Blueprint:
    """Count what the cost of compressing a model depends on.

    Args:
        model: See :func:`ppcl.inspection.model.inspect_model`.
        height: Of the picture, pixels; 1024 if None.
        width: Likewise.
        frames: Of a video; what the pipeline draws if None.
        text_tokens: Of its prompt; what is usual for the family if None.
        dtype: Of the weights.
        component: Which transformer of a pipeline.

    Raises:
        ModelError: There is no usable config, or none of a family whose calls are known.
    """
    config, vae_scale = read_config(model, component)
    transformer: Any = nn.Module.to(build_on_meta(config), dtype)  # diffusers' own warns of what has no weights here
    height, width = height or 1024, width or 1024
    family = config["_class_name"].removeprefix(PREFIX)
    drawn = frames or FRAMES.get(family, 1)
    grid = token_grid(height, width, vae_scale)
    arguments = example_call(transformer, grid, text_tokens, 1 + (drawn - 1) // FRAME_SCALE)
    if arguments is None:
        raise ModelError(
            f"what compressing a {type(transformer).__name__} takes is not estimated: its calls are not known before "
            "one is captured"
        )
    arguments = to_dtype(arguments, dtype)
    adapter = adapter_for(transformer)
    alone = SimpleNamespace(**{component: transformer}, components={})
    info = describe(alone, flops_on_meta(transformer, arguments), component)
    info = replace(info, bytes_per_param=dtype.itemsize)
    sizes = loaded_bytes(model, dtype)
    here = sizes.get(component, 0) > 0
    text = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    others = sum(sizes.values()) - sizes.get(component, 0) - text
    shapes = Shapes(
        info,
        itemsize=dtype.itemsize,
        decode=height * width * DECODE.get(family, DECODE_OTHERS),
        text=text if here else dtype.itemsize * TEXT_NUMBERS.get(family, 0.0),
        vae=others if here else dtype.itemsize * VAE_NUMBERS,
        files_here=here,
        joined=family in JOINED,
        **_of_calls(transformer, adapter, arguments, info, dtype),
    )
    return Blueprint(transformer, adapter, arguments, shapes)


def dtype_for(model: str, kind: str, streamed: bool, precision: str, component: str = TRANSFORMER) -> torch.dtype:
    """What weights are in: bfloat16 on a GPU; on a CPU float32, or streamed what the files have."""
    if precision == "fp32":
        return torch.float32
    if kind != "cpu":
        return torch.bfloat16
    return (stored_dtype(model, component=component) or torch.float32) if streamed else torch.float32


def _of_calls(
    transformer: Any, adapter: Adapter, arguments: dict[str, Any], info: ModelInfo, dtype: torch.dtype
) -> dict[str, Any]:
    """What a call with one block of each stack tells; fields of :class:`Shapes`."""
    few = {spec.name: list(adapter.blocks(transformer, spec))[:1] for spec in adapter.stacks}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    small: Any = bare_copy(with_blocks(transformer, few), fake)
    precision = "fp32" if dtype == torch.float32 else "bf16"
    calls: dict[str, BlockCall] = {}
    with fake:
        batch = fake_tree(arguments)

        def forward() -> Tensor:
            with torch.no_grad(), autocast(torch.device("cpu"), precision):
                return velocity(small, batch)

        def backward() -> None:
            given = [t.requires_grad_() for t in _tensors(batch) if t.is_floating_point()]
            with autocast(torch.device("cpu"), precision):
                output = velocity(small, batch)
            torch.autograd.grad(output, given, torch.empty_like(output), allow_unused=True)

        with torch.no_grad():
            answer = run_traced(small, adapter, batch, lambda call: calls.update({call.stack.name: call}))
        peaks = {"forward": simulated_peak(forward, small), "backward": simulated_peak(backward, small)}
    steps = [
        _train_bytes(transformer, adapter, spec, arguments, precision) for spec in adapter.stacks if spec.name in calls
    ]
    step = (max(step[0] for step in steps), max(step[1] for step in steps), max(step[2] for step in steps))
    numbers = [sum(state.numel() for state in call.inputs.values()) for call in calls.values()]
    tokens = [sum(state.shape[1] for state in call.inputs.values()) for call in calls.values()]
    every = [*_tensors(arguments), *([answer] if answer is not None else [])]
    parts = tuple(
        _part(spec, list(adapter.blocks(transformer, spec)), calls[spec.name], stack.block_flops)
        for spec, stack in zip(adapter.stacks, info.stacks, strict=True)
        if spec.name in calls
    )
    record = sum(tensor.numel() * tensor.element_size() for tensor in every)
    return {"parts": parts, "state": max(numbers), "tokens": max(tokens), "record": record, "step": step, **peaks}


def _train_bytes(
    transformer: Any, adapter: Adapter, spec: StackSpec, arguments: dict[str, Any], precision: str
) -> tuple[int, int, int]:
    """Bytes that a step of a substitute allocates: on one state; on more, what is there once, and for each state."""
    blocks = adapter.blocks(transformer, spec)
    block = copy.deepcopy(blocks[0]).float().requires_grad_(True)
    run = (spec.name, 0, min(1, len(blocks) - 1))
    peaks = {}
    for count in (1, 2, 4):
        batch = {name: _repeated(value, count) for name, value in arguments.items()}
        peaks[count] = local_step_bytes(transformer, adapter, batch, {run: block}, precision)[run]
    each = (peaks[4] - peaks[2]) // 2
    return peaks[1], max(0, peaks[2] - 2 * each), each


def _repeated(value: Any, count: int) -> Any:
    """An argument of one state as of several; what has no entry for each stays."""
    if isinstance(value, list) and len(value) == 1:
        return value * count
    is_of_state = isinstance(value, Tensor) and value.ndim > 0 and len(value) == 1
    return value.repeat(count, *[1] * (value.ndim - 1)) if is_of_state else value


def _part(spec: StackSpec, blocks: list[nn.Module], call: BlockCall, flops: tuple[int, ...]) -> Part:
    block = blocks[0]
    spec = spec.of(block)
    features = {stream: state.shape[-1] for stream, state in call.inputs.items()}
    streams = tuple(d for stream, d in features.items() if call.outputs.get(stream) is not None)
    networks = {s: p for s, p in spec.ffn.items() if s in features}
    units = {stream: neurons_of(block.get_submodule(path)) for stream, path in networks.items()}
    hidden = tuple((cut.count, features[stream]) for stream, cut in units.items() if cut)
    apart = (*networks.values(), *spec.modulation.values())
    matrices = [
        matrix_of(layer).shape
        for name, layer in block.named_modules()
        if is_matrix(layer) and not any(f"{name}.".startswith(f"{path}.") for path in apart)
    ]
    hidden += tuple((i, o) for o, i in matrices if i > o)  # neurons that no module of their own holds
    text = features.get("text", 0) if spec.text_qkv and _has(block, spec.text_qkv) else 0
    layers = [block.get_submodule(path) for path in spec.modulation.values()]
    modulation = tuple((m.out_features, m.in_features) for m in layers if isinstance(m, nn.Linear))
    most = max(map(count_params, blocks))
    of_networks = tuple(features[stream] for stream in networks)
    return Part(len(blocks), most, max(flops), streams, of_networks, hidden, text, modulation)


def _has(block: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in block.named_modules())


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]
