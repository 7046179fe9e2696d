"""The stages of a run, and how a run is resumed.

One stage is one function, one command and one place in the run directory. A stage that is done is recorded in
``stages.json`` with a digest of everything it depended on (its config section, the seed, the digests of the stages
before it); it is skipped while that digest stays the same and its files are there. A changed config runs the stage
and all that follow again; what a user can have got wrong is checked before anything older is removed.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from ppcl.analysis.artifacts import Analysis
from ppcl.capture.prompts import prompts_for
from ppcl.common.artifacts import load_artifact, save_artifact
from ppcl.common.files import (
    digest,
    lock_folder,
    read_json,
    read_tensor_header,
    read_tensors,
    remove,
    remove_leftovers,
    write_json,
    write_text,
)
from ppcl.config import RunConfig
from ppcl.errors import ArtifactError, UserError
from ppcl.run.record import record_of
from ppcl.student.plan import CompressionPlan
from ppcl.training.launch import world
from ppcl.training.tracking import Tracker

STAGES = ("capture", "analyze", "fit", "plan", "distill", "export", "evaluate", "report")
PRODUCTS = {
    "capture": ("calibration",),
    "analyze": ("analysis.json", "analysis.safetensors"),
    "fit": ("candidates.json", "candidates.safetensors", "width.safetensors"),
    "plan": ("plan.json",),
    "distill": ("bundle",),
    "export": ("pipeline",),
    "evaluate": ("eval",),
    "report": ("report.html", "report.md"),
}
# Training states: kept while a stage is interrupted, useless once what it depends on has changed.
CHECKPOINTS = {
    "fit": ("checkpoints/fit",),
    "distill": (
        *(f"checkpoints/distill-{part}" for part in ("masks", "local", "alternating", "output")),
        "samples",
    ),
}
# Stages that all processes work on; of the others the first one does them while the rest wait.
SHARED = ("fit", "distill")
READS = {
    "analyze": ("calibration",),
    "fit": ("calibration", "analysis.json", "analysis.safetensors"),
    "plan": ("analysis.json", "candidates.json"),
    "distill": ("calibration", "plan.json", "candidates.safetensors", "width.safetensors"),
    "export": ("bundle",),
    "evaluate": ("calibration", "plan.json", "pipeline"),
}


class Run:
    """A run directory and what its stages share.

    Args:
        model: ``emoji``, a folder, or a hub id.
        out: The run directory.
        config: The resolved config.
        prompts: The user's prompts file, if any.
        command: The command line, for the record.

    Raises:
        ModelError: There is no such model.
        ArtifactError: The directory belongs to another model or another prompts file.
    """

    def __init__(
        self, model: str, out: Path, config: RunConfig, prompts: Path | None = None, command: str = ""
    ) -> None:
        self.model, self.out, self.config, self.prompts, self.command = model, out, config, prompts, command
        from ppcl.common.devices import resolve_device
        from ppcl.teacher.loading import check_model, weights_digest
        from ppcl.training.distributed import connect

        self.group = connect(world() > 1 and resolve_device(config.device).type == "cpu", config.processes)
        check_model(model)
        self.calibration_prompts, self.evaluation_prompts = prompts_for(model, prompts, config.evaluate.num_prompts)
        self.identity = digest(weights_digest(model), self.calibration_prompts, self.evaluation_prompts, config.seed)
        self._locked = False
        self.stages: dict[str, Any] = self._claim()
        self._log_path = out / "log.jsonl"
        self.group.barrier()  # all have looked at the directory before the first one writes into it

    def _claim(self) -> dict[str, Any]:
        """Read what is done in the directory, or refuse one that is another's; nothing is written yet."""
        record = self.out / "stages.json"
        if record.is_file():
            try:
                stages = read_json(record)
            except ArtifactError as error:
                what = str(error).partition("; ")[0]
                raise ArtifactError(f"{what}; choose another --out or delete {self.out}") from None
            if not isinstance(stages, dict) or stages.get("identity") != self.identity:
                owner = stages.get("model", "another model") if isinstance(stages, dict) else "another model"
                raise ArtifactError(
                    f"{self.out} holds a run of {owner} with other weights, prompts, evaluate.num_prompts or seed; "
                    "choose another --out or delete it"
                )
            return stages
        try:
            empty = not self.out.is_dir() or all(p.name.startswith(".") for p in self.out.iterdir())
        except OSError as error:
            reason = error.strerror or error
            raise ArtifactError(f"{self.out} cannot be read: {reason}; choose another --out") from error
        if not empty:
            raise ArtifactError(f"{self.out} is not empty and not a run of ppcl; choose another --out")
        return {"schema_version": 1, "model": self.model, "identity": self.identity}

    def _lock(self) -> None:
        """Take the directory for as long as this run lives, and clear up after attempts that were killed."""
        if self._locked:
            return
        descriptor = lock_folder(self.out)
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)
        self._locked = True
        remove_leftovers(self.out)
        self.stages = self._claim()

    # What stages share, loaded when first needed.
    @cached_property
    def device(self) -> Any:
        """The device of the run."""
        import torch

        from ppcl.common.devices import resolve_device

        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        return self.group.place(resolve_device(self.config.device))

    @cached_property
    def tracker(self) -> Tracker:
        """The mirror of the log in wandb."""
        config = {"identity": self.identity, "model": self.model, **self.config.model_dump(mode="json")}
        return Tracker(self.config.wandb, self.out, config)

    @cached_property
    def teacher(self) -> Any:
        """The teacher's pipeline."""
        from ppcl.common.devices import weights_dtype
        from ppcl.teacher.loading import load_pipeline

        return load_pipeline(self.model, self.device, weights_dtype(self.device, self.config.precision))

    @cached_property
    def adapter(self) -> Any:
        """The adapter of the teacher's transformer."""
        from ppcl.teacher.families import adapter_for

        return adapter_for(self.teacher.transformer)

    @cached_property
    def extractor(self) -> Any:
        """The features behind the scores."""
        from ppcl.run.evaluation import choose_extractor

        return choose_extractor(self.model, self.config.evaluate.features, str(self.device))

    @cached_property
    def planned(self) -> CompressionPlan:
        """The plan, looked for before anything older is removed; a search may take long to find it."""
        from ppcl.pruning.searches import plan_of_run

        return plan_of_run(self)

    def read(self, kind: Any, name: str) -> Any:
        """Read a JSON artifact of this run."""
        return load_artifact(kind, self.out / name)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to ``log.jsonl`` and mirror it in wandb, if asked."""
        try:
            with self._log_path.open("a", encoding="utf-8") as file:
                print(json.dumps(row), file=file, flush=True)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {self._log_path}: {reason}; free some space and run again") from error
        self.tracker.log(row)

    def depends(self, stage: str) -> str:
        """Digest of everything a stage depends on."""
        section: Any = getattr(self.config, stage, None)  # the report has no settings
        shared = [self.identity, self.config.seed, self.config.precision]
        upstream = self.depends(STAGES[STAGES.index(stage) - 1]) if stage != STAGES[0] else ""
        return digest(stage, section.identity() if section else None, shared, upstream)

    def is_done(self, stage: str) -> bool:
        """Whether a stage ran with what it depends on now, and its products are there."""
        record = self.stages.get(stage)
        if not isinstance(record, dict) or record.get("digest") != self.depends(stage):
            return False
        return all((self.out / name).exists() for name in (*PRODUCTS[stage], *record.get("files", ())))

    def run(self, stage: str) -> bool:
        """Run a stage unless it is done; returns whether it ran.

        Raises:
            UserError: A stage before it is not done, another process works here, or the stage failed.
        """
        if not self.group.on_main(lambda: self._begin(stage)):
            return False
        began = time.perf_counter()
        if stage in SHARED:
            FUNCTIONS[stage](self)
        else:
            self.group.on_main(lambda: FUNCTIONS[stage](self))
        self.group.on_main(lambda: self._finish(stage, time.perf_counter() - began))
        return True

    def _begin(self, stage: str) -> bool:
        """Make the directory ready for a stage; False if it is done."""
        position = STAGES.index(stage)
        if position and not self.is_done(STAGES[position - 1]):
            raise UserError(
                f"ppcl {stage} needs the stage before it; run ppcl {STAGES[position - 1]} first, or ppcl compress"
            )
        if self.is_done(stage):
            return False
        self._check(stage)
        self._lock()
        if self.is_done(stage):  # by a process that has just left
            return False
        write_text(self.out / "config.yaml", record_of(self.model, self.command, self.config, str(self.device)))
        wanted = self.depends(stage)
        old = self.stages.get(stage)
        same = isinstance(old, dict) and old.get("digest") == wanted  # some of its files went missing; keep the rest
        if old is not None and not same:
            self._forget(position)
        if not same and self.stages.get(f"{stage}.started") != wanted:
            for name in (*PRODUCTS[stage], *CHECKPOINTS.get(stage, ())):  # leftovers of an attempt with other settings
                remove(self.out / name)
        self._record({**self.stages, f"{stage}.started": wanted})
        return True

    def _finish(self, stage: str, seconds: float) -> None:
        done = {k: v for k, v in self.stages.items() if k != f"{stage}.started"}
        record = {"digest": self.depends(stage), "seconds": round(seconds, 2), "files": self._files(stage)}
        self._record({**done, stage: {**record, "command": self.command}})

    def _check(self, stage: str) -> None:
        """Find what a user can have got wrong before anything of an earlier attempt is removed.

        Raises:
            UserError: A model, device, input or setting of the stage cannot be used.
        """
        for name in READS.get(stage, ()):
            path = self.out / name
            if path.suffix == ".json":
                read_json(path)
            for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
                if file.suffix == ".safetensors":
                    read_tensor_header(file)
        if stage == "capture":
            from ppcl.capture.pictures import check_data

            check_data(self.teacher, self.config.capture)
        elif stage in ("fit", "distill"):
            from ppcl.pruning.criteria import check_criterion

            check_criterion(self.config, stage)
        elif stage == "plan":
            _ = self.planned
        elif stage == "evaluate":
            _ = self.extractor

    def _files(self, stage: str) -> list[str]:
        """Files that a stage wrote into its folders, relative to the run directory."""
        found = (p for name in PRODUCTS[stage] for p in (self.out / name).rglob("*") if p.is_file())
        return sorted(str(p.relative_to(self.out)) for p in found)

    def _forget(self, position: int) -> None:
        """Remove the products of a stage and of all after it."""
        self._record({k: v for k, v in self.stages.items() if k not in STAGES[position:]})
        for stage in STAGES[position:]:
            for name in PRODUCTS[stage]:
                remove(self.out / name)

    def _record(self, stages: dict[str, Any]) -> None:
        self.stages = stages
        write_json(self.out / "stages.json", stages)


def capture_stage(run: Run) -> None:
    """Record the teacher's denoising states."""
    from ppcl.capture.pictures import capture_run

    capture_run(run)


def analyze_stage(run: Run) -> None:
    """Probes, CKA, intervals, linearity."""
    import torch

    from ppcl.analysis.analyze import analyze
    from ppcl.capture.states import States
    from ppcl.teacher.call_arguments import batch_size, to_device
    from ppcl.teacher.calls import velocity
    from ppcl.teacher.description import describe
    from ppcl.teacher.families import check_inferred
    from ppcl.teacher.flops import count_flops

    transformer = run.teacher.transformer
    calibration = run.out / "calibration"
    one = to_device(next(States(calibration, "held-out").batches(1)), run.device)
    check_inferred(transformer, one, batch_size(one))
    stacks = {spec.name: list(run.adapter.blocks(transformer, spec)) for spec in run.adapter.stacks}
    with torch.no_grad():
        flops = count_flops(transformer, stacks, lambda: velocity(transformer, one), batch_size(one))
    model = describe(run.teacher, flops)
    analyze(transformer, run.adapter, model, calibration, run.out, run.config.analyze, run.config.seed)


def fit_stage(run: Run) -> None:
    """Costs of candidate runs."""
    from ppcl.distill.fit import fit

    fit(
        run.teacher.transformer,
        run.adapter,
        run.read(Analysis, "analysis.json"),
        read_tensors(run.out / "analysis.safetensors", str(run.device))[0],
        run.out / "calibration",
        run.out,
        run.config.fit,
        run.config.seed,
        lambda row: run.log({"stage": "fit", **row}),
        run.group,
        run.config.precision,
    )


def plan_stage(run: Run) -> None:
    """Choose the runs under the budget."""
    save_artifact(run.planned, run.out / "plan.json")
    del run.planned  # a later plan is another one


def distill_stage(run: Run) -> None:
    """Train the substitutes."""
    from ppcl.distill.stage import distill_run

    distill_run(run)


def export_stage(run: Run) -> None:
    """Write the pipeline."""
    from ppcl.export.pipeline import export_run

    export_run(run)


def evaluate_stage(run: Run) -> None:
    """Pictures and numbers."""
    from ppcl.run.evaluation import evaluate_run

    evaluate_run(run)


def report_stage(run: Run) -> None:
    """The report, as a page and as Markdown."""
    from ppcl.eval.report import write_report

    write_report(run.out)


FUNCTIONS: dict[str, Callable[[Run], None]] = {
    "capture": capture_stage,
    "analyze": analyze_stage,
    "fit": fit_stage,
    "plan": plan_stage,
    "distill": distill_stage,
    "export": export_stage,
    "evaluate": evaluate_stage,
    "report": report_stage,
}
