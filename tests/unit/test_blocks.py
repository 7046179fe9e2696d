"""The block source: pipelines' files in all their forms, and how much of them is in memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import DUAL, qwen_call, shared_pipeline, tiny_qwen
from torch import Tensor

import ppcl.teacher.streaming
from ppcl.analysis.sweep import Batch, Course, Seen, forward_sweep
from ppcl.capture.store import StateStore
from ppcl.common.files import read_json, write_json
from ppcl.config import load_config
from ppcl.errors import ModelError
from ppcl.eval.speed import _return_freed_memory
from ppcl.run.session import Session
from ppcl.teacher.blocks import ResidentBlocks, StreamedBlocks, free_bytes, loaded_bytes
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.flops import count_flops

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from random_pipeline import anonymous_bytes, write_transformer

CPU = torch.device("cpu")


def saved(folder: Path, **options: Any) -> tuple[str, dict[str, Tensor]]:
    """A pipeline folder with the transformer alone, and its weights."""
    transformer = tiny_qwen(3)
    transformer.save_pretrained(folder / "transformer", **options)
    entry = ["diffusers", "QwenImageTransformer2DModel"]
    write_json(folder / "model_index.json", {"_class_name": "QwenImagePipeline", "transformer": entry})
    return str(folder), transformer.state_dict()


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "60KB"}, {"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "60KB"}]
)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_single_files_shards_and_variants(options: dict[str, Any], variant: str | None, tmp_path: Path) -> None:
    model, weights = saved(tmp_path, **options)
    source = StreamedBlocks(model, CPU, variant=variant)
    assert source.dtype == torch.float32
    for (stack, index), block in zip(source.order, source.walk(source.order), strict=True):
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, weights[f"{stack}.{index}.{name}"])
    with source.block(DUAL, 1) as block:
        assert torch.equal(block.attn.to_q.weight, weights[f"{DUAL}.1.attn.to_q.weight"])
    assert torch.equal(source.transformer.img_in.weight, weights["img_in.weight"])


def test_weights_stay_as_they_are_stored(tmp_path: Path) -> None:
    write_transformer(tmp_path, 2, width=128)
    source = StreamedBlocks(str(tmp_path), CPU)
    with source.block(DUAL, 0) as block:
        dtypes = {parameter.dtype for parameter in block.parameters()}
    assert dtypes == {torch.bfloat16}
    assert source.transformer.proj_out.weight.dtype == torch.bfloat16


def test_a_variant_has_its_own_dtype(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    tiny_qwen(3).bfloat16().save_pretrained(tmp_path / "transformer", variant="bf16")
    assert StreamedBlocks(model, CPU, variant="bf16").dtype == torch.bfloat16
    assert StreamedBlocks(model, CPU).dtype == torch.float32


def test_a_block_is_freed_when_its_user_fails(tmp_path: Path) -> None:
    source = StreamedBlocks(saved(tmp_path)[0], CPU)
    with pytest.raises(ZeroDivisionError), source.block(DUAL, 0) as block:
        assert not block.attn.to_q.weight.is_meta
        raise ZeroDivisionError
    assert all(p.is_meta for block in source.transformer.transformer_blocks for p in block.parameters())


def test_what_is_wrong_with_the_files_is_said(tmp_path: Path) -> None:
    model, weights = saved(tmp_path)
    file, config = tmp_path / "transformer/diffusion_pytorch_model.safetensors", tmp_path / "transformer/config.json"
    whole = {name: tensor.clone() for name, tensor in weights.items()}
    save_file({n: t for n, t in whole.items() if n != f"{DUAL}.1.attn.to_q.weight"}, file)
    source = StreamedBlocks(model, CPU)
    with pytest.raises(ModelError, match=r"the files have no 'transformer_blocks.1.attn.to_q.weight'"):
        list(source.walk(source.order))
    save_file(whole | {f"{DUAL}.1.attn.to_q.weight": torch.zeros(3, 3)}, file)
    source = StreamedBlocks(model, CPU)
    with pytest.raises(ModelError, match=r"disagree \(size mismatch"), source.block(DUAL, 1):
        pass
    content = read_json(config)
    write_json(config, content | {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(ModelError, match="quantised"):
        StreamedBlocks(model, CPU)
    write_json(config, content)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"\.bin is a pickle, .* fetch transformer as safetensors"):
        StreamedBlocks(model, CPU)
    with pytest.raises(ModelError, match="hf download nobody/nothing"):
        StreamedBlocks("nobody/nothing", CPU)


def test_a_streamed_transformer_can_be_called_as_a_whole(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, max_shard_size="60KB")
    source, call = StreamedBlocks(model, CPU), qwen_call(2)
    stacks = {DUAL: list(source.transformer.transformer_blocks)}
    with torch.no_grad(), source.whole() as transformer:
        answer = velocity(transformer, call)
        flops = count_flops(transformer, stacks, lambda: velocity(transformer, call), 2)
    whole = tiny_qwen(3)
    with torch.no_grad():
        assert torch.equal(answer, velocity(whole, call))
    stacks = {DUAL: list(whole.transformer_blocks)}
    assert flops == count_flops(whole, stacks, lambda: velocity(whole, call), 2)
    assert all(weight.is_meta for block in source.transformer.transformer_blocks for weight in block.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in source.transformer.modules())


def test_bytes_of_what_would_be_loaded(tmp_path: Path) -> None:
    model, weights = saved(tmp_path, max_shard_size="60KB")
    numbers = sum(tensor.numel() for tensor in weights.values())
    assert loaded_bytes(model, torch.bfloat16) == {"transformer": 2 * numbers}
    assert loaded_bytes("nobody/nothing", torch.bfloat16) == {}
    assert free_bytes(CPU) > 0


@pytest.mark.parametrize(("free", "expected"), [(1, StreamedBlocks), (1e12, ResidentBlocks)])
def test_auto_takes_what_fits_and_says_so(
    free: float, expected: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared_pipeline().save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {n}" for n in range(12)))
    config = load_config([], ["device=cpu", "evaluate.num_prompts=5"])
    session = Session(str(tmp_path / "model"), tmp_path / "run", config, prompts)
    assert "8 prompts calibrate and 4 evaluate, of 5 wanted: a third at most" in capsys.readouterr().err
    monkeypatch.setattr(ppcl.teacher.streaming, "free_bytes", lambda _: free)
    assert isinstance(session.open_blocks(), expected)
    kind = "streamed" if expected is StreamedBlocks else "resident"
    assert f"blocks are {kind}: the transformer's weights take 0.0 GB; {free / 1e9:.1f} GB are free" in (
        capsys.readouterr().err
    )


class Peak:
    """The most anonymous memory while blocks run."""

    def __init__(self) -> None:
        self.bytes = 0

    def begin(self, *_: Any) -> tuple[str, ...]:
        return ()

    def see(self, seen: Seen) -> None:
        self.bytes = max(self.bytes, anonymous_bytes())

    def finish(self) -> None:
        pass


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Width 512: a block has 9.4M parameters."""
    peaks, block_bytes = {}, 0
    for num_blocks in (2, 8):
        folder = tmp_path / str(num_blocks)
        write_transformer(folder, num_blocks, width=512, text=24)
        call = qwen_call(2, text=5)
        _return_freed_memory()  # or the first model would take what tests before have freed, and seem smaller
        before = anonymous_bytes()
        source, peak = StreamedBlocks(str(folder), CPU), Peak()
        half = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
        batch = Batch(0, "train", 0, lambda half=half: Call(half, torch.zeros(2)))
        forward_sweep(Course(source, [batch], StateStore(tmp_path / "states", "test")), [peak])
        peaks[num_blocks] = peak.bytes - before
        listing = json.loads((folder / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
        block_bytes = listing["metadata"]["total_size"] // num_blocks
    assert peaks[8] < peaks[2] + block_bytes, (peaks, block_bytes)
    assert peaks[8] < 4 * block_bytes, (peaks, block_bytes)


def test_copies_have_weights_of_their_own_whether_the_block_is_lent_or_not(tmp_path: Path) -> None:
    model, weights = saved(tmp_path)
    resident = tiny_qwen(3)
    resident.load_state_dict(weights)
    for source in (StreamedBlocks(model, CPU), ResidentBlocks(resident)):
        place = source.order[0]
        expected = resident.get_submodule(f"{place[0]}.{place[1]}").state_dict()
        for lent in (None, *source.walk(source.order[:1])):
            copied = source.copy(place)
            assert all(torch.equal(copied.state_dict()[name], tensor) for name, tensor in expected.items())
            own = {p.data_ptr() for p in copied.parameters()}
            assert lent is None or own.isdisjoint(p.data_ptr() for p in lent.parameters())
        assert len(source.copies(place[0])) == sum(name == place[0] for name, _ in source.order)
