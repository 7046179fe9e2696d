"""The run directory, its stages, and the glue between them."""

from ppcl.run.rounds import open_rounds
from ppcl.run.run import Run, open_run
from ppcl.run.session import Session
from ppcl.run.stage import Stage
from ppcl.run.stages import STAGES

__all__ = ["STAGES", "Run", "Session", "Stage", "open_rounds", "open_run"]
