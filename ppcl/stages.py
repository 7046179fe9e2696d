"""The stages of a run, and how a run is resumed.

One stage is one function, one command and one place in the run directory. A stage that is
done is recorded in ``stages.json`` with a digest of everything it depended on (its config
section, the seed, the digests of the stages before it); it is skipped while that digest
stays the same. A changed config runs the stage and all that follow again.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ppcl.artifacts import Analysis, Candidates, CompressionPlan, load_artifact, save_artifact
from ppcl.config import RunConfig
from ppcl.errors import ArtifactError, UserError
from ppcl.files import digest, read_json, read_tensors, write_json, write_text
from ppcl.prompts import prompts_for

STAGES = ("capture", "analyze", "fit", "plan", "distill", "export", "evaluate", "report")
PRODUCTS = {
    "capture": ("calibration",),
    "analyze": ("analysis.json", "analysis.safetensors"),
    "fit": ("candidates.json", "candidates.safetensors"),
    "plan": ("plan.json",),
    "distill": ("bundle",),
    "export": ("pipeline",),
    "evaluate": ("eval",),
    "report": ("report.html",),
}
# Training states: kept while a stage is interrupted, useless once what it depends on has changed.
CHECKPOINTS = {
    "fit": ("checkpoints/fit",),
    "distill": ("checkpoints/distill-local", "checkpoints/distill-output"),
}
PACKAGES = ("ppcl", "torch", "diffusers", "transformers", "open_clip_torch", "torchmetrics")


class Run:
    """A run directory and what its stages share.

    Args:
        model: ``emoji``, a folder, or a hub id.
        out: The run directory.
        config: The resolved config.
        prompts: The user's prompts file, if any.
        command: The command line, for the record.

    Raises:
        ArtifactError: The directory belongs to another model or another prompts file.
    """

    def __init__(
        self, model: str, out: Path, config: RunConfig, prompts: Path | None = None, command: str = ""
    ) -> None:
        self.model, self.out, self.config, self.command = model, out, config, command
        from ppcl.teacher import weights_digest

        self.calibration_prompts, self.evaluation_prompts = prompts_for(model, prompts, config.evaluate.num_prompts)
        self.identity = digest(weights_digest(model), self.calibration_prompts, self.evaluation_prompts, config.seed)
        self._claim(model)
        self._log_path = out / "log.jsonl"

    def _claim(self, model: str) -> None:
        """Make the directory this run's, or refuse one that is another's."""
        record = self.out / "stages.json"
        if record.is_file():
            stages = read_json(record)
            if not isinstance(stages, dict) or stages.get("identity") != self.identity:
                owner = stages.get("model", "another model") if isinstance(stages, dict) else "another model"
                raise ArtifactError(
                    f"{self.out} holds a run of {owner} with other weights, prompts or seed; "
                    "choose another --out or delete it"
                )
            self.stages: dict[str, Any] = stages
            return
        if self.out.is_dir() and any(p for p in self.out.iterdir() if not p.name.startswith(".")):
            raise ArtifactError(f"{self.out} is not empty and not a run of ppcl; choose another --out")
        self.stages = {"schema_version": 1, "model": model, "identity": self.identity}
        write_json(record, self.stages)

    # What stages share, loaded when first needed.

    @cached_property
    def device(self) -> Any:
        """The device of the run."""
        import torch

        from ppcl.teacher import resolve_device

        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        return resolve_device(self.config.device)

    @cached_property
    def teacher(self) -> Any:
        """The teacher's pipeline."""
        from ppcl.teacher import load_pipeline

        return load_pipeline(self.model, self.device)

    @cached_property
    def adapter(self) -> Any:
        """The adapter of the teacher's transformer."""
        from ppcl.adapters import adapter_for

        return adapter_for(self.teacher.transformer)

    def read(self, kind: Any, name: str) -> Any:
        """Read a JSON artifact of this run."""
        return load_artifact(kind, self.out / name)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to ``log.jsonl``."""
        with self._log_path.open("a", encoding="utf-8") as file:
            print(json.dumps(row), file=file, flush=True)

    def depends(self, stage: str) -> str:
        """Digest of everything a stage depends on."""
        section: Any = {
            "capture": self.config.capture,
            "analyze": self.config.analyze,
            "fit": self.config.fit,
            "plan": self.config.plan,
            "distill": self.config.distill,
            "export": self.config.export,
            "evaluate": self.config.evaluate,
        }.get(stage)
        before = STAGES[: STAGES.index(stage)]
        shared = [self.identity, self.config.seed, self.config.precision]
        upstream = self.depends(before[-1]) if before else ""
        return digest(stage, section.model_dump() if section else None, shared, upstream)

    def is_done(self, stage: str) -> bool:
        """Whether a stage ran with what it depends on now, and its products are there."""
        record = self.stages.get(stage)
        products = all((self.out / name).exists() for name in PRODUCTS[stage])
        return record is not None and record["digest"] == self.depends(stage) and products

    def run(self, stage: str) -> bool:
        """Run a stage unless it is done; returns whether it ran.

        Raises:
            UserError: A stage before it is not done.
        """
        position = STAGES.index(stage)
        if position and not self.is_done(STAGES[position - 1]):
            raise UserError(
                f"ppcl {stage} needs the stage before it; run ppcl {STAGES[position - 1]} first, or ppcl compress"
            )
        if self.is_done(stage):
            return False
        self._write_config()
        if (old := self.stages.get(stage)) and old["digest"] != self.depends(stage):
            self._forget(position)
        started = self.stages.get(f"{stage}.started")
        if started != self.depends(stage):
            for name in (*PRODUCTS[stage], *CHECKPOINTS.get(stage, ())):  # leftovers of an attempt with other settings
                _remove(self.out / name)
            self._record({f"{stage}.started": self.depends(stage)})
        began = time.perf_counter()
        FUNCTIONS[stage](self)
        seconds = time.perf_counter() - began
        done = {k: v for k, v in self.stages.items() if k != f"{stage}.started"}
        self.stages = {**done, stage: {"digest": self.depends(stage), "seconds": round(seconds, 2)}}
        write_json(self.out / "stages.json", self.stages)
        return True

    def _forget(self, position: int) -> None:
        """Remove the products of a stage and of all after it."""
        for stage in STAGES[position:]:
            self.stages.pop(stage, None)
            for name in PRODUCTS[stage]:
                _remove(self.out / name)
        write_json(self.out / "stages.json", self.stages)

    def _record(self, change: dict[str, Any]) -> None:
        self.stages = {**self.stages, **change}
        write_json(self.out / "stages.json", self.stages)

    def _write_config(self) -> None:
        """Write the resolved config, versions and where it runs."""
        record = {
            "model": self.model,
            "command": self.command,
            "seed": self.config.seed,
            "device": f"{self.device} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)",
            "python": sys.version.split()[0],
            "versions": {name: _version(name) for name in PACKAGES},
            "git_commit": _commit(),
            "config": self.config.model_dump(mode="json"),
        }
        write_text(self.out / "config.yaml", yaml.safe_dump(record, sort_keys=False, allow_unicode=True))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that runs, if it is one."""
    try:
        here = Path(__file__).resolve().parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def capture_stage(run: Run) -> None:
    """Record the teacher's denoising states."""
    from ppcl.capture import capture

    capture(run.teacher, run.calibration_prompts, run.out / "calibration", run.config.capture, run.config.seed)


def analyze_stage(run: Run) -> None:
    """Probes, CKA, intervals, linearity."""
    import torch

    from ppcl.analysis.analyze import analyze
    from ppcl.capture import States, velocity
    from ppcl.cost import count_flops
    from ppcl.teacher import describe
    from ppcl.trees import batch_size, to_device

    transformer = run.teacher.transformer
    calibration = run.out / "calibration"
    one = next(States(calibration, "held-out").batches(1))
    one = to_device(one, run.device)
    stacks = {spec.name: list(run.adapter.blocks(transformer, spec)) for spec in run.adapter.stacks}
    with torch.no_grad():
        flops = count_flops(transformer, stacks, lambda: velocity(transformer, one), batch_size(one))
    model = describe(run.teacher, flops)
    analyze(transformer, run.adapter, model, calibration, run.out, run.config.analyze, run.config.seed)


def fit_stage(run: Run) -> None:
    """Costs of candidate runs."""
    from ppcl.fit import fit

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
    )


def plan_stage(run: Run) -> None:
    """Choose the runs under the budget."""
    from ppcl.planner import plan

    analysis, candidates = run.read(Analysis, "analysis.json"), run.read(Candidates, "candidates.json")
    save_artifact(plan(analysis, candidates, run.config.plan), run.out / "plan.json")


def distill_stage(run: Run) -> None:
    """Train the substitutes."""
    from ppcl.distill.trainer import Distiller, check_plan
    from ppcl.teacher import config_digest

    plan = run.read(CompressionPlan, "plan.json")
    check_plan(plan, config_digest(run.teacher.transformer), run.out / "plan.json")
    Distiller(
        run.teacher.transformer,
        run.adapter,
        plan,
        run.out / "calibration",
        run.out,
        run.config.distill,
        run.config.seed,
        run.config.precision,
        run.log,
    ).run()


def export_stage(run: Run) -> None:
    """Write the pipeline."""
    from ppcl.bundle import build_student, load_bundle
    from ppcl.export import export

    bundle = load_bundle(run.out / "bundle", run.teacher.transformer, run.adapter)
    student = build_student(run.teacher.transformer, run.adapter, bundle)
    export(run.teacher, student, bundle.plan, run.model, run.out / "pipeline", run.config.export)


def evaluate_stage(run: Run) -> None:
    """Pictures and numbers."""
    from ppcl.evaluation import evaluate_run

    evaluate_run(run)


def report_stage(run: Run) -> None:
    """The HTML report."""
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
