"""Feature extractors: resizing, a tiny random open_clip folder, what happens without weights."""

from __future__ import annotations

import json
import logging
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ppcl.errors import ModelError
from ppcl.eval import features
from ppcl.eval.features import FeatureExtractor, InceptionExtractor, load_extractor, resize

CAPTIONS = ["grinning cat", "red heart", "blue whale"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder with random weights, of the embedded evaluator's form."""
    import open_clip
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "<unk>", *sorted({w for c in CAPTIONS for w in c.split()}), "<end>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", words.index("<end>"))]
    )
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    text = {"context_length": 6, "vocab_size": len(words), "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {**text, "hf_tokenizer_name": "tokenizer"}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(8, vision, text)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def pictures(count: int, size: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("source", "target"), [(64, 48), (20, 48), (200, 37)])
def test_resize_is_pils_bicubic_in_floating_point(source: int, target: int) -> None:
    images = pictures(2, source)
    expected = np.stack(
        [
            [
                np.asarray(Image.fromarray(plane.astype(np.float32)).resize((target, target), Image.Resampling.BICUBIC))
                for plane in image
            ]
            for image in images.numpy()
        ]
    ).clip(0, 255)
    assert np.abs(resize(images, target).numpy() - expected).max() < 1e-2
    assert not torch.equal(resize(images, target), resize(images, target).round())


def test_resize_modes_keep_or_drop_the_edges() -> None:
    images = torch.zeros(1, 3, 10, 20, dtype=torch.uint8)
    images[..., 5:15] = 200  # the centre square
    assert resize(images, 10, "shortest").min() == 200
    padded = resize(images, 20, "longest", fill=7)
    assert padded.shape == (1, 3, 20, 20)
    assert (padded[:, :, [0, 4, 15, 19]] == 7).all()
    assert resize(images, 10, "squash").min() == 0


def test_clip_folder_gives_both_towers(clip_folder: Path) -> None:
    extractor = load_extractor(f"local-dir:{clip_folder}")
    images = pictures(3)
    image, text = extractor.image_features(images), extractor.text_features(CAPTIONS)
    assert text is not None
    assert image.shape == text.shape == (3, 8)
    assert image.dtype == text.dtype == torch.float32
    assert not torch.allclose(image.norm(dim=1), torch.ones(3), atol=1e-2), "raw features are wanted"
    assert not torch.allclose(text[0], text[1])
    assert torch.equal(image, extractor.image_features(images))
    assert str(clip_folder.parent) not in extractor.name


def test_features_match_open_clips_own_preprocessing(clip_folder: Path) -> None:
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    images = pictures(2, 16)  # no resizing: everything else must agree to float precision
    inputs = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        expected = model.eval().encode_image(inputs)
    assert torch.allclose(load_extractor(f"local-dir:{clip_folder}").image_features(images), expected, atol=1e-5)


def test_chunks_do_not_change_the_order(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = load_extractor(f"local-dir:{clip_folder}")
    images = pictures(5)
    whole = extractor.image_features(images)
    monkeypatch.setattr(features, "CHUNK", 2)
    assert torch.allclose(extractor.image_features(images), whole, atol=1e-6)


def test_emoji_is_the_folder_in_the_assets(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match=r"open_clip_config\.json is missing.*local-dir:FOLDER"):
        load_extractor("emoji")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "evaluator").symlink_to(clip_folder)
    assert load_extractor("emoji").name == "emoji"


def test_missing_and_damaged_weights_are_user_errors(clip_folder: Path, tmp_path: Path) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_extractor(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(ModelError, match="weights file"):
        load_extractor(f"local-dir:{tmp_path}")
    with pytest.raises(ModelError, match="is missing"):
        load_extractor(f"local-dir:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("emojy", "did you mean 'emoji'"),
        ("ViT-B-23/openai", "did you mean 'ViT-B-32'"),
        ("ViT-B-32/openia", "did you mean 'openai'"),
        ("ViT-B-32", "ViT-B-32/openai"),
    ],
)
def test_unknown_names_name_the_nearest(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_extractor(name)


def test_named_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import open_clip

    asked: dict[str, Any] = {}

    def offline(name: str, **kwargs: Any) -> None:
        asked.update(kwargs, name=name)
        for file in ("/site-packages/open_clip/factory.py", "elsewhere.py"):
            logging.getLogger().handle(logging.LogRecord("root", logging.ERROR, file, 1, "failed", (), None))
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", offline)
    with pytest.raises(ModelError, match=r"downloaded \(no network\).*emoji"):
        load_extractor("ViT-B-32/openai")
    assert [record.pathname for record in caplog.records] == ["elsewhere.py"]  # said once, by who may do without
    assert asked["name"] == "ViT-B-32"
    assert asked["pretrained"] == "openai"
    assert asked["force_quick_gelu"] is True  # OpenAI's weights need it, LAION's must not have it


def test_inception_offline_says_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    with pytest.raises(ModelError, match=r"Inception weights.*evaluate\.features=emoji"):
        load_extractor("inception")


def test_inception_runs_the_networks_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    images = pictures(1, 299)  # already the input size, so the two ways of resizing agree
    (expected,) = network(images)
    found: FeatureExtractor = InceptionExtractor(network, "cpu")
    assert found.text_features(["a"]) is None
    assert torch.allclose(found.image_features(images), expected, atol=1e-5)


def test_inception_weights_in_the_hub_folder_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in the place of the published ones: the real loading code, no download."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "checkpoints" / module.URL_INCEPTION_V3.rpartition("/")[2]
    path.parent.mkdir()
    torch.save(network.state_dict(), path)
    images = pictures(2, 40)
    found = load_extractor("inception").image_features(images)
    path.unlink()  # 100 MB
    assert found.shape == (2, 2048)
    assert torch.allclose(found, InceptionExtractor(network, "cpu").image_features(images), atol=1e-5)


def test_float_pictures_are_refused(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        load_extractor(f"local-dir:{clip_folder}").image_features(torch.zeros(1, 3, 8, 8))
