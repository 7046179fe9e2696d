"""Names and links in models, bundles and results that lead elsewhere: refused in one line, nothing elsewhere read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluation_file import model, write_evaluation

from ppcl.common.outside import inside
from ppcl.errors import ArtifactError, ModelError, UserError
from ppcl.eval.models import sources
from ppcl.eval.report import rewrite
from ppcl.export import formats
from ppcl.export.pipeline import check_source, taken_along, write_components
from ppcl.run.fork import shared_files
from ppcl.student.bundle import check_bundle
from ppcl.teacher.loading import check_model

NAMES = [
    *("../../x", "../bundle", "..", ".", "", "/etc", "a/b", "a\\b", "..\\bundle", "C:", "vae ", "vae\0", "v-ae"),
    *("\ud800", ".ssh", "vae/../../bundle", "~", "1vae"),
]
INDEX = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}


def model_folder(folder: Path, **parts: object) -> Path:
    """What is looked at of a pipeline before it is loaded."""
    for name in ("vae", "transformer"):
        (folder / name).mkdir(parents=True)
    (folder / "vae" / "config.json").write_text("{}")
    index = {**INDEX, "vae": ["diffusers", "AutoencoderKL"], **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder of the user's own."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("config.json", "LICENSE", "id_rsa"):
        (folder / name).write_text('{"the key": "secret"}')
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_components_are_arguments_of_a_pipeline_and_no_paths(name: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "models" / "tiny", **{name: ["diffusers", "AutoencoderKL"]})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "plan.json").write_text("elsewhere")
    for look in (check_model, check_source, lambda text: sources([text])):
        with pytest.raises(ModelError, match=r"^[^\n]*names a component .*; fetch the pipeline again$"):
            look(str(folder))


def inside_out(secret: Path) -> dict[str, Callable[[Path], object]]:
    """Links that lead out of a model's folder, by what they stand for."""

    def link(name: str, target: Path | str) -> Callable[[Path], object]:
        def make(folder: Path) -> None:
            path = folder / name
            if path.is_dir():
                path.rename(folder / "was")
            path.unlink(missing_ok=True)
            path.symlink_to(target)

        return make

    def chain(folder: Path) -> None:
        (folder / "NOTICE").symlink_to("within")
        (folder / "within").symlink_to(secret / "LICENSE")

    return {
        "licence": link("LICENSE", secret / "LICENSE"),
        "licence with a suffix": link("LICENCE.md", secret / "id_rsa"),
        "relative": link("LICENSE", "../../mine/LICENSE"),
        "code": link("pipeline.py", secret / "id_rsa"),
        "component": link("vae", secret),
        "component of a relative": link("vae", "../../mine"),
        "config": link("vae/config.json", secret / "config.json"),
        "one more file": link("vae/x.safetensors", secret / "id_rsa"),
        "a folder in a component": link("vae/deep", secret),
        "index": link("model_index.json", Path("..") / "model_index.json"),
        "link to a link": chain,
        "the folder above": link("vae/up", ".."),
    }


@pytest.mark.parametrize("kind", inside_out(Path()))
def test_links_are_followed_inside_the_folder_alone(kind: str, tmp_path: Path, secret: Path) -> None:
    folder = model_folder(tmp_path / "models" / "tiny")
    (tmp_path / "models" / "model_index.json").write_text((folder / "model_index.json").read_text())
    inside_out(secret)[kind](folder)
    target = tmp_path / "out"
    target.mkdir()
    if kind == "the folder above":  # it leads out of its component, not out of the model; no folder is copied twice
        assert taken_along(folder)[0] == ["vae"]
        return
    for look in (check_source, lambda text: write_components(SimpleNamespace(), Path(text), target)):
        with pytest.raises(ArtifactError, match=r"^[^\n]* is a link that leads out of its model's folder"):
            look(str(folder))
    assert not list(target.iterdir())


@pytest.mark.parametrize("link", [False, True])
def test_links_inside_are_followed(tmp_path: Path, link: bool) -> None:
    folder = model_folder(tmp_path / "tiny", text_encoder=["transformers", "CLIPTextModel"])
    (folder / "text").write_text("terms")
    (folder / "LICENSE").symlink_to("text")
    (folder / "NOTICE").symlink_to("nowhere")
    (folder / "LICENSES").mkdir()
    (folder / "text_encoder").symlink_to("vae")
    (folder / "transformer").rmdir()
    (folder / "transformer").symlink_to(tmp_path)  # it is not taken along
    target = tmp_path / "out"
    target.mkdir()
    write_components(SimpleNamespace(), folder, target, link)
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == {
        *("LICENSE", "model_index.json", "vae/config.json", "text_encoder/config.json")
    }
    assert not any(path.is_symlink() for path in target.rglob("*"))


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path, secret: Path) -> None:
    """Snapshots lead to blobs; blobs that lead on lead out."""
    repo = tmp_path / "models--owner--tiny"
    snapshot = model_folder(repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    for number, name in enumerate(("model_index.json", "vae/config.json")):
        (snapshot / name).rename(repo / "blobs" / str(number))
        (snapshot / name).symlink_to(Path(*[".."] * (2 + name.count("/"))) / "blobs" / str(number))
    assert taken_along(snapshot)[0] == ["vae"]
    (snapshot / "LICENSE").symlink_to("../../blobs/2")
    (repo / "blobs" / "2").symlink_to(secret / "LICENSE")
    with pytest.raises(ArtifactError, match="LICENSE is a link that leads out"):
        taken_along(snapshot)
    (repo / "blobs" / "2").unlink()
    (repo / "blobs").rename(secret / "blobs")
    (repo / "blobs").symlink_to(secret / "blobs")
    with pytest.raises(ArtifactError, match="leads out"):
        taken_along(snapshot)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "..", "", "a/../../x", "x\0", "\ud800", "..\\x"]
)
@pytest.mark.parametrize(
    "listing",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "model.safetensors.index.bf16.json",
        "pytorch_model.bin.index.json",
    ],
)
def test_shards_lie_beside_their_index(name: str, listing: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "tiny")
    (tmp_path / "x.safetensors").write_bytes(bytes(16))
    (folder / "vae" / listing).write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(UserError, match=r"names .*, which is nothing in its folder"):
        check_model(str(folder))


WRONG = ["../x", "/etc/passwd", "..", "", "a/../../x", "a\0", 7, None]


@pytest.mark.parametrize("name", WRONG)
def test_what_runs_and_bundles_list_lies_in_them(name: object, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("elsewhere")
    folder = tmp_path / "bundle"
    folder.mkdir()
    with pytest.raises(ArtifactError, match="nothing in its folder"):
        inside(folder, name, "x.json")
    if isinstance(name, str):  # a key
        (folder / "bundle.json").write_text(json.dumps({"files": {name: "0"}}))
        with pytest.raises(ArtifactError, match=r"bundle\.json names .*, which is nothing in its folder"):
            check_bundle(folder)
    with pytest.raises(ArtifactError, match=r"stages\.json names .*, which is nothing in its folder"):
        shared_files(folder, {"capture": {"files": [name]}})


@pytest.mark.parametrize("label", ["../mine", "/", "..", "a/../../mine"])
def test_a_label_of_results_is_no_path(label: str, tmp_path: Path) -> None:
    folder = tmp_path / "judged"
    (tmp_path / "mine" / "seed-0").mkdir(parents=True)
    (folder / "pictures").mkdir(parents=True)
    write_evaluation(folder, [model(label, {})], [])
    with pytest.raises(ArtifactError, match="nothing in its folder"):
        rewrite(folder)


def test_a_pipeline_for_other_programs_takes_no_more_along(
    tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock: Any = SimpleNamespace(name="X", model=None, tensors={}, multiplied_out={}, provenance={})
    for name in ("write_weights", "name_class"):
        monkeypatch.setattr(formats, name, lambda *_, **__: None)
    folder = model_folder(tmp_path / "tiny", _name_or_path=str(tmp_path))
    (folder / "README.md").symlink_to(secret / "id_rsa")
    with pytest.raises(ArtifactError, match=r"README\.md is a link that leads out"):
        formats._write_pipeline(stock, folder, tmp_path / "out")
    (folder / "README.md").unlink()
    (folder / "README.md").write_text("a card")
    formats._write_pipeline(stock, folder, tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "model_index.json").read_text()
    with pytest.raises(ArtifactError, match="which is read"):
        formats.export_as(folder, folder / "out", "diffusers")
