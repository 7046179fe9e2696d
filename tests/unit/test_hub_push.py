"""Pushing a finished pipeline, with a hub that is made up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from ppcl import api, cli
from ppcl.cli.options import Budget, Push, Settings
from ppcl.errors import ArtifactError, HubError
from ppcl.export.hub import check_repo_id, push
from ppcl.training.distributed import SINGLE

CARD = 'from_pretrained("HERE")'


class Hub:
    """Takes HfApi's place; keeps what was uploaded, or raises ``error`` in one of its calls."""

    def __init__(self, error: Exception | None = None, where: str = "create_repo", public: bool = False) -> None:
        self.error, self.where, self.public = error, where, public
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}

    def __call__(self) -> Hub:
        return self

    def _happen(self, name: str, **arguments: Any) -> None:
        self.calls.append((name, arguments))
        if self.error is not None and name == self.where:
            raise self.error

    def create_repo(self, repo_id: str, **arguments: Any) -> str:
        self._happen("create_repo", repo_id=repo_id, **arguments)
        return f"https://hub.invalid/{repo_id}"

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, *, folder_path: Path, ignore_patterns: list[str], **arguments: Any) -> None:
        self._happen("upload_folder", **arguments)
        for path in sorted(folder_path.glob("**/*")):  # as the real one finds files
            if path.is_file() and path.name not in ignore_patterns:
                self.files[path.relative_to(folder_path).as_posix()] = path.read_bytes()

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, **arguments: Any) -> None:
        self._happen("upload_file", **arguments)
        self.files[path_in_repo] = path_or_fileobj


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline folder as export writes it."""
    folder = tmp_path / "run" / "pipeline"
    for name in ("transformer", "vae"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    (folder / "transformer" / "weights.safetensors").write_text("ours")
    (folder / "vae" / "weights.safetensors").write_text("the teacher's")
    (folder / "README.md").write_text(CARD)
    return folder


def test_links_that_lead_elsewhere_go_nowhere(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub())
    (tmp_path / "secret").write_text("mine")
    for name in ("LICENSE", "vae/more.safetensors", "README.md"):
        (pipeline / name).unlink(missing_ok=True)
        (pipeline / name).symlink_to(tmp_path / "secret")
        with pytest.raises(ArtifactError, match=f"{name} is a link that leads out"):
            push(pipeline, "user/name")
        (pipeline / name).unlink()
    assert not hub.calls and not hub.files


def refused(status: int, text: str) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://hub.invalid/api")
    return HfHubHTTPError(text, response=httpx.Response(status, request=request))


def use(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    return hub


def test_everything_goes_up(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub())
    assert push(pipeline, "user/name", placeholder="HERE") == "https://hub.invalid/user/name"
    assert set(hub.files) == {
        *("transformer/config.json", "transformer/weights.safetensors"),
        *("vae/config.json", "vae/weights.safetensors", "README.md"),
    }
    assert hub.files["vae/weights.safetensors"] == b"the teacher's"
    assert hub.files["README.md"] == b'from_pretrained("user/name")'
    assert (pipeline / "README.md").read_text() == CARD
    calls = dict(hub.calls)
    assert calls["create_repo"] == {"repo_id": "user/name", "private": None, "exist_ok": True}
    assert calls["upload_folder"]["delete_patterns"] == ["transformer/*"]  # shards of an older push


def test_private(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub())
    push(pipeline, "user/name", True)
    assert dict(hub.calls)["create_repo"]["private"] is True
    hub = use(monkeypatch, Hub(public=True))
    with pytest.raises(HubError, match="user/name exists and is public; make it private in its settings"):
        push(pipeline, "user/name", True)
    assert not hub.files


@pytest.mark.parametrize("where", ["create_repo", "upload_folder", "upload_file"])
@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (refused(401, "401 Client Error.\n\nInvalid username or password."), "hf auth login"),
        (LocalTokenNotFoundError("Token is required, but no token found."), "hf auth login"),
        (refused(403, "403 Forbidden: You don't have the rights"), "a token that may write there"),
        (refused(404, "Repository Not Found"), "check the name"),
        (refused(500, "Internal Server Error"), "check the status of the hub"),
        (httpx.ConnectError("Name or service not known"), "check the network"),
        (ConnectionError("no route"), "check the network"),
        (OfflineModeIsEnabled("offline mode is enabled"), "unset HF_HUB_OFFLINE"),
        (RuntimeError(""), "check the network"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_are_one_line_and_lose_nothing(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str, where: str
) -> None:
    use(monkeypatch, Hub(error, where))
    with pytest.raises(HubError) as raised:
        push(pipeline, "user/name")
    text = str(raised.value)
    assert remedy in text
    assert "the same command again only pushes" in text
    assert "\n" not in text
    hub = use(monkeypatch, Hub())
    push(pipeline, "user/name")
    assert len(hub.files) == 5


@pytest.mark.parametrize(
    "name", ["name", "a/b/c", "user/na me", "-user/name", "user/name.git", "", "user/" + "n" * 120]
)
def test_wrong_names_are_found_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(HubError, match="write it like user/name"):
        check_repo_id(name)
    with pytest.raises(HubError, match="write it like user/name"):
        cli.compress("emoji", tmp_path / "run", Settings(), Budget(), Push(name))
    with pytest.raises(HubError, match="write it like user/name"):
        api.compress("emoji", tmp_path / "run", push_to_hub=name)
    assert not (tmp_path / "run").exists()


class FinishedRun:
    """A run whose stages are done."""

    def __init__(self, out: Path) -> None:
        self.out, self.ran, self.group, self.first = out, 0, SINGLE, None

    def is_done(self, stage: str) -> bool:
        return True

    def run(self, stage: str) -> bool:
        return False


@pytest.mark.parametrize("command", ["compress", "export"])
def test_the_command_pushes_and_fails_with_code_2(
    command: str,
    finished_run: Path,
    tiny_model: Path,
    small_config: Path,
    prompts_file: Path,
    tmp_path: Path,
    ppcl: Callable[..., tuple[object, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    given = (command, tiny_model, "--out", run, "--config", small_config, "--prompts", prompts_file)
    monkeypatch.setattr("ppcl.export.hub.has_token", lambda: False)
    use(monkeypatch, Hub(refused(401, "Invalid username or password")))
    code, _, err = ppcl(*given, "--push-to-hub", "user/name", "--private")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert "hf auth login" in err.splitlines()[-1]
    assert "no token for the hub yet" in caplog.text  # said before the work, too
    hub = use(monkeypatch, Hub())
    code, out, err = ppcl(*given, "--push-to-hub", "user/name", "--private")
    assert code == 0, err
    assert "pushed:  https://hub.invalid/user/name" in out
    assert {"model_index.json", "transformer/config.json"} <= set(hub.files)
    card = hub.files["README.md"].decode()
    assert "user/name" in card and str(run) not in card


def test_private_alone_is_warned_about(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cli, "open_run", lambda *_: FinishedRun(pipeline.parent))
    monkeypatch.setattr("sys.argv", ["ppcl", "export", "emoji", "--out", str(pipeline.parent), "--private"])
    hub = use(monkeypatch, Hub())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert "--private has no effect without --push-to-hub" in caplog.text
    assert not hub.calls
