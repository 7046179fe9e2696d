"""Mirror of ``log.jsonl`` in Weights & Biases, when asked (``--set wandb=offline`` or ``online``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ppcl.errors import UserError


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
        if self._run is None:
            self._run = self._start(self.mode)
        stage = row.get("stage", "run")
        self._run.log({f"{stage}/{key}": value for key, value in row.items() if key != "stage"})

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
