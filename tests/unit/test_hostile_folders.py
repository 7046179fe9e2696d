"""Whose is the folder? One that is somebody else's is refused and left as it is; links are removed, not followed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluation_file import model, write_evaluation
from test_hostile_names import model_folder

from ppcl.common.files import atomic_path, remove, write_json, write_text
from ppcl.common.folders import LEDGER, OF_STAGES, check_apart, check_claim
from ppcl.config import load_config
from ppcl.errors import ArtifactError, ModelError, UserError
from ppcl.eval.command import check_out, evaluate_models
from ppcl.eval.report import rewrite
from ppcl.experiments.ladder import export_size
from ppcl.run.folder import RunFolder
from ppcl.run.stages import STAGES


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: what links lead to, and what files hold."""

    def content(path: Path) -> str:
        if path.is_symlink():
            return str(path.readlink())
        return path.read_text() if path.is_file() else "/"

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


FOREIGN = [
    *("metrics.json", "metrics.schema.json", "report.md", "report.html", "reference.npz", "features/x", "pictures/0"),
    *(".ssh.old-99/id_rsa", ".ssh/id_rsa", ".gitkeep", ".x.tmp-1", ".tmpABCDEF", ".bundle.old-3.ppcl/x", "notes.txt"),
    *(".other.json.tmp-1.ppcl", "evaluation.json/x", "stages.json/x", ".lock.old"),
]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("kind", ["run", "evaluation"])
def test_a_folder_that_holds_something_else_is_left_as_it_is(kind: str, name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"mine": 1}')
    (out / ".lock").touch()
    before = tree(out)

    def claim() -> None:
        if kind == "run":
            RunFolder(out, "tiny", "identity").lock()
        else:
            config = load_config([], [])
            evaluate_models([str(model_folder(tmp_path / "tiny"))], out, config, ["a cat"])

    with pytest.raises(UserError, match=r"out is not empty and not an? \w+ of ppcl \(it holds .*choose another --out$"):
        claim()
    assert tree(out) == before


@pytest.mark.parametrize("names", [(), (".lock",), (".lock", "..lock.pid.tmp-4.ppcl", ".stages.json.tmp-4.ppcl")])
def test_an_empty_folder_and_one_of_a_killed_start_are_taken(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    RunFolder(tmp_path, "tiny", "identity").lock()
    RunFolder(tmp_path / "new" / "run", "tiny", "identity").lock()
    assert set(tree(tmp_path)) == {*(".lock", ".lock.pid"), *("new", "new/run", "new/run/.lock", "new/run/.lock.pid")}


def test_an_evaluation_is_known_by_its_marker_or_its_numbers(tmp_path: Path) -> None:
    for name in ("new", "old", "foreign", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    write_json(tmp_path / "new" / "evaluation.json", {})
    write_evaluation(tmp_path / "old", [model("a", {})], [])
    (tmp_path / "foreign" / "metrics.json").write_text('{"accuracy": 1}')
    (tmp_path / "run" / "stages.json").write_text("{}")
    check_out(tmp_path / "new")
    check_out(tmp_path / "old")
    for name in ("foreign", "run"):
        with pytest.raises(UserError, match="choose another --out"):
            check_out(tmp_path / name)


@pytest.mark.parametrize("ledger", ['{"stages": []}', "[]", "3", "{"])
def test_reports_are_written_into_runs_and_evaluations_alone(ledger: str, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(ledger)
    (tmp_path / "report.html").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ArtifactError):
        rewrite(tmp_path)
    assert tree(tmp_path) == before


def test_nothing_is_written_where_something_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = model_folder(tmp_path / "tiny")
    (tmp_path / "link").symlink_to(tiny)
    (tmp_path / "real").mkdir()
    monkeypatch.chdir(tiny)
    config, before = load_config([], []), tree(tmp_path)
    for out in (tiny, tiny / "out", tiny / "a" / "b", tmp_path / "link" / "out", Path("out"), Path("../tiny/out")):
        with pytest.raises(ArtifactError, match=r"choose another --out"):
            evaluate_models([str(tiny)], out, config, ["a cat"])
    with pytest.raises(ArtifactError, match="real, which is read"):
        evaluate_models([str(tiny)], tmp_path / "real" / "out", config, ["a cat"], tmp_path / "real")
    assert tree(tmp_path) == before
    check_apart(tmp_path / "tiny-2", [tiny])
    check_apart(tmp_path, [tiny])


def test_nothing_is_written_into_what_a_stage_removes(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text("{}")
    for name in OF_STAGES:
        for out in (tmp_path / name, tmp_path / name / "deep" / "er"):
            with pytest.raises(ArtifactError, match="which a stage of the run writes"):
                check_apart(out, [])
    check_apart(tmp_path / "sizes" / "eval", [])
    written = {name for stage in STAGES.values() for name in (*stage.products, *stage.on_the_way) if "." not in name}
    assert written == set(OF_STAGES)


def test_capture_writes_not_into_the_pictures_that_it_reads(tmp_path: Path) -> None:
    tiny, data = model_folder(tmp_path / "tiny"), tmp_path / "data"
    data.mkdir()
    config = load_config([], [f"capture.data={data}"])
    common: dict[str, Any] = {
        "component": "transformer",
        "config": config,
        "model": str(tiny),
        "teacher": None,
        "first": None,
    }
    session: Any = SimpleNamespace(**common, out=data / "run", is_pictured=False)
    with pytest.raises(ArtifactError, match=r"data/run lies in .*data, which is read"):
        STAGES["capture"].prepare(session)
    (data / "metadata.jsonl").touch()  # pictures that are listed are these
    with pytest.raises(ModelError, match="no image-to-image sibling"):
        STAGES["capture"].prepare(session)


def test_compress_writes_not_into_the_model(ppcl: Callable[..., tuple[object, str, str]], tmp_path: Path) -> None:
    tiny = model_folder(tmp_path / "tiny")
    before = tree(tmp_path)
    code, _, err = ppcl("compress", tiny, "--out", tiny / "run", "--keep", "0.5")
    assert code == 2
    assert "tiny/run lies in" in err.splitlines()[-1]
    assert tree(tmp_path) == before


def test_another_size_is_written_neither_into_the_model_nor_into_the_run_s_own_folders(tmp_path: Path) -> None:
    tiny, run = model_folder(tmp_path / "tiny"), tmp_path / "run"
    (run / "bundle").mkdir(parents=True)
    (run / "bundle" / "bundle.json").touch()
    write_json(run / LEDGER, {"model": str(tiny)})
    before = tree(tmp_path)
    for out in (tiny / "out", run / "bundle" / "out", run / "pipeline"):
        with pytest.raises(ArtifactError, match="choose another --out"):
            export_size(run, out, "keep", 0.7)
    assert tree(tmp_path) == before


def linked(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("target", ["folder", "file", "nowhere", "loop"])
@pytest.mark.parametrize("product", ["eval", "pipeline", "bundle"])
def test_a_product_that_is_a_link_is_removed_and_not_followed(product: str, target: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "folder").mkdir(parents=True)
    (mine / "folder" / "x").write_text("mine")
    (mine / "file").write_text("mine")
    before = tree(mine)
    folder = RunFolder(tmp_path / "run", "tiny", "identity")
    folder.lock()
    linked(tmp_path / "run" / product, product if target == "loop" else mine / target)
    stage = next(stage for stage in STAGES.values() if product in stage.products)
    folder.begin(stage, "digest", [])
    assert not (tmp_path / "run" / product).is_symlink()
    assert tree(mine) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove everything")
def test_what_cannot_be_removed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a").chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot remove"):
            remove(tmp_path / "a" / "b")
    finally:
        (tmp_path / "a").chmod(0o700)


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    """``--table docs`` removed docs."""
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "deep" / "x").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*docs: a folder is there"):
        write_text(tmp_path / "docs", "a table")
    assert tree(tmp_path) == before


def test_a_new_folder_takes_the_place_of_a_link_and_not_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    linked(tmp_path / "run" / "pipeline", tmp_path / "mine")
    with atomic_path(tmp_path / "run" / "pipeline") as temporary:
        temporary.mkdir()
        (temporary / "y").write_text("new")
    assert tree(tmp_path) == {"mine": "/", "mine/x": "mine", "run": "/", "run/pipeline": "/", "run/pipeline/y": "new"}


def test_a_claim_names_what_is_there(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff")).touch()
    with pytest.raises(ArtifactError, match="it holds") as caught:
        check_claim(tmp_path, "stages.json", "a run")
    str(caught.value).encode()
    assert json.dumps(str(caught.value))
