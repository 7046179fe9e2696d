"""The Python way in: one function that runs all stages."""

from __future__ import annotations

from pathlib import Path

from ppcl.config import RunConfig, load_config
from ppcl.run import open_rounds


def compress(
    model: str,
    out: str | Path,
    config: RunConfig | None = None,
    prompts: str | Path | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Compress a text-to-image pipeline; the same call again resumes.

    Args:
        model: ``emoji``, a pipeline folder, or a hub id.
        out: The run directory.
        config: From :func:`ppcl.load_config`; what it does not set is the model's default.
        prompts: A text file with one prompt a line.
        push_to_hub: A repository, ``user/name``, that the finished pipeline is uploaded to.
        private: Create that repository private.

    Returns:
        The folder of the compressed pipeline, for ``DiffusionPipeline.from_pretrained``.

    Raises:
        UserError: Anything that a user can mend; the message says how.
    """
    from ppcl.export.card import PLACEHOLDER
    from ppcl.export.hub import check_repo_id, push

    if push_to_hub is not None:
        check_repo_id(push_to_hub)
    settings, prompts_file = config or load_config([], []), Path(prompts) if prompts else None
    for step in open_rounds(model, Path(out), settings, prompts_file, "ppcl.compress(...)"):
        for stage in step.stages:
            step.run.run(stage)
    pipeline = Path(out) / "pipeline"
    if push_to_hub is not None:
        push(pipeline, push_to_hub, private, PLACEHOLDER)
    return pipeline
