"""Pushing a finished pipeline to the hub; what fails here loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppcl.common.outside import check_links, real_places
from ppcl.errors import HubError

CARD = "README.md"
REMEDIES = {
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "use a token that may write there (`hf auth login`), or another name",
    404: "check the name, and that the token may write there",
    409: "wait a minute",
    429: "wait a few minutes",
}


def check_repo_id(repo_id: str) -> None:
    """Find a misspelt name before hours of work.

    Raises:
        HubError: It is not of the form owner/name, or has characters that the hub refuses.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise HubError(
            f"--push-to-hub {repo_id!r} is not a repository's name; write it like user/name "
            "(letters, digits, '-', '_', '.')"
        )


def has_token() -> bool:
    """Whether somebody is logged in to the hub on this machine."""
    from huggingface_hub import get_token

    return bool(get_token())


def push(folder: Path, repo_id: str, private: bool = False, placeholder: str = "") -> str:
    """Upload a pipeline folder; what the hub has already is not sent again.

    Weights of an older push are removed from the repository's ``transformer`` folder; nothing else is.

    Args:
        folder: The pipeline.
        repo_id: ``user/name``; created if it is not there.
        private: Create it private; one that is there and public is refused.
        placeholder: Text in the card that ``repo_id`` takes the place of.

    Returns:
        The repository's address.

    Raises:
        HubError: There is no token, no network, or the hub refused.
        ArtifactError: A link leads out of the folder.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    check_repo_id(repo_id)
    check_links([folder], real_places(folder))
    api = huggingface_hub.HfApi()
    failures: tuple[type[Exception], ...] = (HfHubHTTPError, OSError, ValueError, RuntimeError, *_network_errors())
    try:
        url = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and api.repo_info(repo_id).private is False:
            raise HubError(f"{repo_id} exists and is public; make it private in its settings, or choose another name")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Pipeline compressed by ppcl",
            ignore_patterns=[CARD, ".*"],
            delete_patterns=["transformer/*"],
        )
        card = (folder / CARD).read_text(encoding="utf-8")
        api.upload_file(
            path_or_fileobj=(card.replace(placeholder, repo_id) if placeholder else card).encode(),
            path_in_repo=CARD,
            repo_id=repo_id,
            commit_message="Model card",
        )
    except HubError:
        raise
    except failures as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:200] if lines else type(error).__name__
        raise HubError(
            f"{folder} could not be pushed to {repo_id} ({reason}); {_remedy(error)}; "
            "the run is finished and kept, the same command again only pushes"
        ) from None
    return url


def _network_errors() -> tuple[type[Exception], ...]:
    """Errors of the HTTP library of newer hub clients, which are no OSErrors."""
    try:
        import httpx
    except ImportError:
        return ()
    return (httpx.HTTPError,)


def _remedy(error: Exception) -> str:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        status = 401
    if isinstance(error, OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE"
    if status is None:
        return "check the network"
    return REMEDIES.get(status, "check the status of the hub and the message")
