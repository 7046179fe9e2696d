"""Text encoders made shorter: by the layers that no embedding depends on, and by none where the last one is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, WIDTH, flow_scheduler
from transformers import AutoModelForCausalLM

from ppcl.common.files import read_json
from ppcl.export.text_encoders import embeddings
from ppcl.teacher.loading import load_pipeline

Call = Callable[..., tuple[object, str, str]]
LAYERS, READ = 36, 27  # of FLUX.2 [klein]'s text encoder; it reads hidden states 9, 18 and 27


def flux2_klein() -> Any:
    """FLUX.2 [klein]: hidden states from the middle of a language model."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from ppcl.emoji.components import new_tokenizer

    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    tokenizer = new_tokenizer(["a red cat", "an old house"])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=LAYERS,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        )
    )  # fmt: skip
    decoder = AutoencoderKLFlux2(
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    return Flux2KleinPipeline(flow_scheduler(), decoder, text_encoder, tokenizer, transformer, is_distilled=False)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("klein") / "model"
    flux2_klein().save_pretrained(folder)
    return folder


def test_layers_that_nothing_reads_are_left_out(
    ppcl: Call, klein: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "teacher"
    code, printed, err = ppcl("teacher", klein, "--trim-text-encoders", "--out", out)
    assert (code, printed.strip()) == (0, f"ppcl compress {out} --out RUN"), err
    assert (
        f"text_encoder: {READ + 1} of {LAYERS} layers are read" in caplog.text
    )  # state 27 would be normed as the last
    config = read_json(out / "text_encoder" / "config.json")
    assert (config["num_hidden_layers"], len(config["layer_types"])) == (READ + 1, READ + 1)
    before, after = (load_pipeline(str(folder), torch.device("cpu")) for folder in (klein, out))
    assert all(map(torch.equal, embeddings(before), embeddings(after)))
    encoder, info = AutoModelForCausalLM.from_pretrained(out / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(encoder.model.layers) == READ + 1
    for part in ("transformer", "vae"):
        name = "diffusion_pytorch_model.safetensors"
        assert (out / part / name).read_bytes() == (klein / part / name).read_bytes()


@pytest.mark.parametrize("family", ["flux", "z_image"])  # the last state; the last but one, counted from the end
def test_an_encoder_whose_end_is_read_stays(
    ppcl: Call, tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    PIPELINES[family]().save_pretrained(tmp_path / "model")
    code, _, err = ppcl("teacher", tmp_path / "model", "--trim-text-encoders", "--out", tmp_path / "out")
    assert code == 0, err
    assert "all layers of the text encoders are read: they stay as they are" in caplog.text
    for file in (tmp_path / "model").glob("text_encoder*/*.safetensors"):
        assert (tmp_path / "out" / file.relative_to(tmp_path / "model")).read_bytes() == file.read_bytes()


def test_encode_prompt_that_wants_more_than_prompts_is_told(
    ppcl: Call, klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import Flux2KleinPipeline

    def encode_prompt(self: Any, prompt: list[str], picture: Any) -> None:
        """As of a pipeline that shows its text encoder a picture."""

    monkeypatch.setattr(Flux2KleinPipeline, "encode_prompt", encode_prompt)
    code, _, err = ppcl("teacher", klein, "--trim-text-encoders", "--out", tmp_path / "out")
    assert code == 2
    assert "Flux2KleinPipeline.encode_prompt fails on prompts alone" in err
    assert not (tmp_path / "out").exists()
