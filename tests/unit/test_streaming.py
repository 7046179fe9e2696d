"""Pipelines whose transformer reads its blocks as it runs."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_compressed import CALLS, compressed
from tiny_models import DUAL, qwen_call, shared_pipeline, tiny_qwen
from tiny_pipeline import tiny_qwen_pipeline

from ppcl.capture.trajectories import call_pipeline
from ppcl.common.files import read_json, write_json
from ppcl.errors import ModelError
from ppcl.modules.compressed import MODULE
from ppcl.modules.remote_code import write_code
from ppcl.student.assembly import with_blocks
from ppcl.teacher import loading, streaming
from ppcl.teacher.blocks import Place, StreamedBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.loading import load_pipeline
from ppcl.teacher.streaming import choose_blocks, load_streamed, streamed_dtype

CPU = torch.device("cpu")


def stored(transformer: Any, folder: Path, library: str = "diffusers") -> str:
    """A whole pipeline's folder with this transformer."""
    shared_pipeline().save_pretrained(folder)
    for file in (folder / "transformer").iterdir():
        file.unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="60KB")
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"transformer": [library, type(transformer).__name__]})
    return str(folder)


def drawing(num_blocks: int) -> Any:
    """A transformer that fits the pipeline's text encoder."""
    return tiny_qwen_pipeline(num_blocks).transformer


def pictures(pipeline: Any) -> Any:
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "generator": noise}
    return np.stack([np.asarray(picture) for picture in call_pipeline(pipeline, ["a cat", "red"], **arguments).images])


def test_it_draws_what_the_loaded_one_draws_and_holds_nothing(tmp_path: Path) -> None:
    model = stored(drawing(4).bfloat16(), tmp_path)
    pipeline = load_streamed(model, CPU)
    assert {module.dtype for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder)} == {torch.bfloat16}
    assert np.array_equal(pictures(pipeline), pictures(load_pipeline(model, CPU, torch.bfloat16)))
    blocks = pipeline.transformer.transformer_blocks
    assert all(parameter.is_meta for parameter in blocks.parameters())
    pipeline.streamed_blocks.detach()
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)


@pytest.mark.parametrize("library", ["diffusers", MODULE])
@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_smaller_modules_are_streamed_too_with_their_code_beside_them_or_not(
    family: str, library: str, tmp_path: Path
) -> None:
    transformer = compressed(family)
    model = stored(transformer, tmp_path, library)
    if library == MODULE:
        write_code(transformer, tmp_path / "transformer")
    opened = load_streamed(model, CPU).transformer if family == "qwen" else StreamedBlocks(model, CPU).transformer
    source = StreamedBlocks(model, CPU)
    with torch.no_grad(), source.whole() as whole:
        assert torch.equal(velocity(whole, CALLS[family]()), velocity(transformer, CALLS[family]()))
    assert type(opened) is type(transformer)


def test_another_transformer_beside_the_components_of_a_pipeline(tmp_path: Path) -> None:
    model = stored(drawing(4), tmp_path / "teacher")
    teacher = load_streamed(model, CPU)
    other = load_streamed(stored(drawing(2), tmp_path / "student"), CPU, beside=teacher)
    assert other.text_encoder is teacher.text_encoder
    assert other.transformer is not teacher.transformer
    assert np.array_equal(pictures(other), pictures(load_pipeline(str(tmp_path / "student"), CPU)))
    assert len(teacher.transformer.transformer_blocks) == 4
    assert np.array_equal(pictures(teacher), pictures(load_pipeline(model, CPU)))


def reads(source: StreamedBlocks, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the blocks that are read, as they are."""
    numbers: list[int] = []
    read: Callable[[Place | None], Any] = source._weights

    def noted(place: Place | None) -> Any:
        assert place is not None
        numbers.append(place[1])
        return read(place)

    monkeypatch.setattr(source, "_weights", noted)
    return numbers


def test_the_next_block_is_read_ahead_and_after_the_last_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = StreamedBlocks(stored(tiny_qwen(3), tmp_path), CPU)
    numbers = reads(source, monkeypatch)
    with torch.no_grad(), source.whole() as transformer:
        first = velocity(transformer, qwen_call(2))
        assert torch.equal(velocity(transformer, qwen_call(2)), first)
    assert numbers[:6] == [0, 1, 2, 0, 1, 2]  # and the first again, unless the end came sooner


def test_a_block_out_of_turn_is_read_when_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, whole = StreamedBlocks(stored(tiny_qwen(4), tmp_path), CPU), tiny_qwen(4)
    numbers = reads(source, monkeypatch)
    with torch.no_grad(), source.whole() as transformer:
        half, expected = (with_blocks(t, {DUAL: list(t.transformer_blocks)[::2]}) for t in (transformer, whole))
        assert torch.equal(velocity(half, qwen_call(2)), velocity(expected, qwen_call(2)))
    assert numbers[0] == 0
    assert 2 in numbers


def test_a_failing_block_is_freed_and_damaged_files_are_said(tmp_path: Path) -> None:
    source = StreamedBlocks(stored(tiny_qwen(3), tmp_path), CPU)
    with source.whole() as transformer, pytest.raises(TypeError):
        transformer.transformer_blocks[0](1, 2, 3, 4, 5, 6, 7, 8)
    assert all(parameter.is_meta for parameter in source.transformer.transformer_blocks.parameters())
    for file in (tmp_path / "transformer").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:500])
    with torch.no_grad(), source.whole() as transformer, pytest.raises(ModelError, match="cannot be read"):
        velocity(transformer, qwen_call(2))


def test_copies_of_the_transformer_read_for_themselves(tmp_path: Path) -> None:
    source = StreamedBlocks(stored(tiny_qwen(3), tmp_path), CPU)
    with torch.no_grad(), source.whole() as transformer:
        copied = copy.deepcopy(transformer)
        assert torch.equal(velocity(copied, qwen_call(2)), velocity(tiny_qwen(3), qwen_call(2)))


def test_a_closed_pipeline_leaves_memory(tmp_path: Path) -> None:
    pipeline = load_streamed(stored(tiny_qwen(2), tmp_path), CPU)
    left = weakref.ref(pipeline.transformer)
    pipeline.streamed_blocks.detach()
    del pipeline
    gc.collect()
    assert left() is None


def test_weights_that_the_config_does_not_count_are_refused(tmp_path: Path) -> None:
    model, config = stored(tiny_qwen(3), tmp_path), tmp_path / "transformer" / "config.json"
    write_json(config, read_json(config) | {"num_layers": 2})
    with pytest.raises(ModelError, match=f"num_layers is 2, but the files hold 3 of '{DUAL}'"):
        StreamedBlocks(model, CPU)


def test_on_a_cpu_weights_stay_as_they_are_stored_unless_float32_is_asked_for(tmp_path: Path) -> None:
    model = stored(tiny_qwen(2).bfloat16(), tmp_path)
    assert streamed_dtype(model, CPU) == torch.bfloat16
    assert streamed_dtype(model, CPU, "fp32") == torch.float32
    assert streamed_dtype(model, torch.device("cuda")) == torch.bfloat16


def test_files_of_the_hub_are_fetched_before_it_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    asked: list[str] = []

    def download(model: str) -> None:
        asked.append(model)
        raise OSError("no network\nat all")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    monkeypatch.setattr(streaming, "loaded_bytes", lambda model, dtype: {})
    with pytest.raises(ModelError, match="model 'nobody/nothing' cannot be fetched: no network; check the name"):
        choose_blocks("auto", ["nobody/nothing"], CPU)
    assert choose_blocks("resident", ["nobody/nothing"], CPU) == "resident"
    assert asked == ["nobody/nothing"]
    assert loading.stored_folder("nobody/nothing") is None


def test_text_encoders_come_to_a_gpu_layer_by_layer_and_the_rest_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import hooks

    gpu, offloaded, moved = torch.device("cuda", 0), [], []

    def apply(module: Any, onload_device: Any, offload_device: Any, offload_type: str) -> None:
        offloaded.append((module, onload_device, offload_device, offload_type))

    monkeypatch.setattr(hooks, "apply_group_offloading", apply)
    monkeypatch.setattr(torch.nn.Linear, "to", lambda module, device: moved.append((module, device)))
    encoder, vae = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for component, device, is_large in ((encoder, gpu, True), (vae, gpu, False), (encoder, CPU, True)):
        streaming._place(component, device, is_large)
    assert offloaded == [(encoder, gpu, CPU, "leaf_level")]
    assert moved == [(vae, gpu), (encoder, CPU)]
