"""Mirror in Weights & Biases, when asked (``--set wandb=offline`` or ``online``).

What goes there: the rows of ``log.jsonl``, and an evaluation's table, numbers and pictures. The mirror is a
convenience: whatever happens to it, the run goes on and ``log.jsonl`` has every row. accelerate's tracker would hand on
three calls of wandb, and has none of the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)
PICTURE = "picture"  # the key of a row under which a file of pictures stands

MAX_PICTURES = 64  # of a model


class Tracker:
    """Sends the rows of a run to wandb; does nothing in mode ``off``.

    Where wandb is out of reach, rows are kept offline (``wandb sync`` sends them later); where that fails as well,
    they are in ``log.jsonl`` alone. Each is said once.

    Args:
        mode: ``off``, ``offline`` or ``online``.
        out: The run directory; wandb writes its files below it.
        config: Recorded with the run.
    """

    def __init__(self, mode: Literal["off", "online", "offline"], out: Path, config: dict[str, Any]) -> None:
        self.mode, self.out, self.config = mode, out, config
        self._run: Any = None

    def log(self, row: dict[str, Any]) -> None:
        """Send one row under its stage's name; keys are those of ``log.jsonl``, pictures are sent themselves."""
        stage = row.get("stage", "run")

        def content(wandb: Any) -> dict[str, Any]:
            sent = {f"{stage}/{key}": value for key, value in row.items() if key != "stage"}
            if PICTURE in row:
                sent[f"{stage}/{PICTURE}"] = wandb.Image(str(self.out / row[PICTURE]))
            return sent

        self._send(content)

    def evaluation(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        numbers: Mapping[str, float | None],
        pictures: Mapping[str, Sequence[tuple[str, Path]]],
    ) -> None:
        """Send what the report shows: the table as text, numbers to plot, and each model's pictures.

        Args:
            header: Names of the table's columns.
            rows: One text a column each.
            numbers: By name; those that are not known are left out.
            pictures: By model, (prompt, file) pairs; the first 64 are sent.
        """

        def content(wandb: Any) -> dict[str, Any]:
            shown: dict[str, Any] = {
                f"evaluate/pictures/{label}": [
                    wandb.Image(str(path), caption=prompt) for prompt, path in pairs[:MAX_PICTURES]
                ]
                for label, pairs in pictures.items()
            }
            shown["evaluate/table"] = wandb.Table(columns=list(header), data=[list(row) for row in rows])
            return shown | {f"evaluate/{name}": value for name, value in numbers.items() if value is not None}

        self._send(content)

    def _send(self, content: Callable[[Any], dict[str, Any]]) -> None:
        """Send what ``content`` makes with the wandb module; a failure is said, and ends the mirror alone."""
        if self.mode != "off" and self._run is None:
            self._start()
        if self._run is None:
            return
        try:
            import wandb

            self._run.log(content(wandb))
        except Exception as error:  # wandb's errors, its service's, the network's: none of them may end a training
            self._give_up("stopped taking rows", error)

    def _start(self) -> None:
        """Start a wandb run, offline if it cannot be online."""
        try:
            if self.mode == "online":
                try:
                    self._run = self._init("online")
                    return
                except Exception as error:  # see _send
                    said = "wandb is out of reach (%s); the run goes on and keeps its rows for `wandb sync`"
                    logger.warning(said, _reason(error))
                self.mode = "offline"
                import wandb

                wandb.teardown()  # its service still holds the id of the run that could not start
            self._run = self._init("offline")
        except Exception as error:  # see _send
            self._give_up("cannot start", error)

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        # The same id for the same directory: a resumed run goes on in the same wandb run.
        return wandb.init(
            project="ppcl",
            name=self.out.name,
            id=self.config["identity"],
            resume="allow",
            dir=str(self.out),
            mode=mode,
            config=self.config,
        )

    def _give_up(self, what: str, error: Exception) -> None:
        logger.warning("wandb %s (%s); the run goes on, with log.jsonl alone", what, _reason(error))
        self.mode, self._run = "off", None

    def finish(self) -> None:
        """End the wandb run, if one was started."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:  # see _send
                self._give_up("did not end well", error)
            self._run = None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
