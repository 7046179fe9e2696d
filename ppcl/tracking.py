"""Mirror in Weights & Biases, when asked (``--set wandb=offline`` or ``online``).

What goes there: the rows of ``log.jsonl``, and an evaluation's table, numbers and pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ppcl.errors import UserError

MAX_PICTURES = 64  # of a model


class Tracker:
    """Sends the rows of a run to wandb; does nothing in mode ``off``.

    Args:
        mode: ``off``, ``offline`` or ``online``.
        out: The run directory; wandb writes its files below it.
        config: Recorded with the run.
    """

    def __init__(self, mode: Literal["off", "online", "offline"], out: Path, config: dict[str, Any]) -> None:
        self.mode, self.out, self.config = mode, out, config
        self._run: Any = None

    def log(self, row: dict[str, Any]) -> None:
        """Send one row under its stage's name; keys are those of ``log.jsonl``.

        Raises:
            UserError: wandb cannot start (no network, no account).
        """
        if self.mode == "off":
            return
        stage = row.get("stage", "run")
        self._started(self.mode).log({f"{stage}/{key}": value for key, value in row.items() if key != "stage"})

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

        Raises:
            UserError: wandb cannot start (no network, no account).
        """
        if self.mode == "off":
            return
        run = self._started(self.mode)
        import wandb

        shown: dict[str, Any] = {
            f"evaluate/pictures/{label}": [
                wandb.Image(str(path), caption=prompt) for prompt, path in pairs[:MAX_PICTURES]
            ]
            for label, pairs in pictures.items()
        }
        shown["evaluate/table"] = wandb.Table(columns=list(header), data=[list(row) for row in rows])
        shown |= {f"evaluate/{name}": value for name, value in numbers.items() if value is not None}
        run.log(shown)

    def _started(self, mode: Literal["online", "offline"]) -> Any:
        if self._run is None:
            self._run = self._start(mode)
        return self._run

    def _start(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        try:
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
        except (wandb.Error, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"wandb cannot start ({reason}); use --set wandb=offline or off") from None

    def finish(self) -> None:
        """End the wandb run, if one was started."""
        if self._run is not None:
            self._run.finish()
            self._run = None
