"""A run that is killed again and again ends as the undisturbed one, bit for bit.

The kills are real (SIGKILL of a forked process) and repeatable: a process dies at its n-th
*event* inside a stage. Events are the moments just before and just after a file gets its
final name, every training step, every batch of prompts, every batch of pictures, and every
batch that a block sees in a sweep, forward or backward. Run as a script, this file is the
process that imports everything once and forks the attempts.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("capture", "analyze", "fit", "plan", "distill", "export", "evaluate", "report")
# kills inside sweeps: of which kind, and after what share of the stage's batches at blocks
SWEEPS = {"analyze": [("forward", 0.5)], "fit": [("forward", 0.2), ("backward", 0.5), ("forward", 0.1)]}
# the verdict names the measured speed
VOLATILE = ("latency", "times_as_fast", "peak_memory", "speedup", "seconds", "samples_per_second", "verdict")
# the model card has the command and the times
JOURNAL = ("config.yaml", "stages.json", "log.jsonl", "report.html", "report.md", "pipeline/README.md")
JOURNAL += (".lock", ".lock.pid")


# The part that runs as a script


class Events:
    """Counts events by stage, all and those of sweeps; dies at the wanted one."""

    def __init__(self, kill, journal):
        self.kill, self.journal, self.stage, self.counts = kill, journal, None, {}

    def happen(self, name, kind="any"):
        if self.stage is None:
            return
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.journal:
            with Path(self.journal).open("a") as file:
                print(json.dumps([self.stage, kind, self.counts[kind], name]), file=file)
        if self.kill == (self.stage, kind, self.counts[kind]):
            os.kill(os.getpid(), signal.SIGKILL)

    def in_sweeps(self):
        """Make a batch at a block an event of its own kind, of forward or of backward sweeps."""
        from ppcl.analysis.sweep import Visit

        run = Visit.run

        def run_visit(visit, batch, states, others, carried, gradients=None):
            self.happen(f"block {visit.index}", "forward" if gradients is None else "backward")
            return run(visit, batch, states, others, carried, gradients)

        Visit.run = run_visit

    def around(self, owner, name, after=False):
        """Make a function an event, or two."""
        function = getattr(owner, name)

        def wrapper(*arguments, **options):
            self.happen(f"before {name} {arguments[0]!r}"[:200])
            result = function(*arguments, **options)
            if after:
                self.happen(f"after {name} {arguments[0]!r}"[:200])
            return result

        setattr(owner, name, wrapper)

    def install(self):
        import ppcl.capture.trajectories
        import ppcl.eval.generate
        from ppcl.run import Run
        from ppcl.training.loop import TrainingLoop

        self.around(Path, "replace", after=True)
        self.around(TrainingLoop, "step")
        self.around(ppcl.capture.trajectories, "record_calls")
        self.around(ppcl.eval.generate, "draw")
        self.in_sweeps()
        run = Run.run

        def run_stage(this, stage):
            self.stage, self.counts = stage, {}
            return run(this, stage)

        Run.run = run_stage


def attempt(arguments, output, kill=None, journal=None):
    """Run the command in a forked process; returns its exit code, or -9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            Events(kill, journal).install()
            sys.argv = ["ppcl", *arguments]
            from ppcl.cli import main

            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(folder):
    return [str(p) for p in folder.rglob(".*") if ".tmp" in p.name or ".old-" in p.name]


def act(folder, often, *options):
    """Make ``folder/undisturbed`` and ``folder/killed``, killed ``once`` or ``twice`` a stage; print what happened."""
    # imported once here instead of in every attempt; no tensor is touched before the forks
    import matplotlib.pyplot  # noqa: F401
    import open_clip  # noqa: F401
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel  # noqa: F401
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer  # noqa: F401

    import ppcl.distill.fit
    import ppcl.export.pipeline
    import ppcl.run.evaluation
    import ppcl.run.stages  # noqa: F401
    from ppcl.eval.report import write_report  # noqa: F401

    torch.set_num_threads(1)
    folder = Path(folder)
    output, journal = str(folder / "output.txt"), folder / "events.jsonl"
    command = ["compress", *options]
    assert attempt([*command, "--out", str(folder / "undisturbed")], output, journal=str(journal)) == 0
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    chance = random.Random(20)
    history = []
    for stage in STAGES:
        counts = {kind: n for name, kind, n, _ in events if name == stage}
        kills = [(kind, int(share * counts[kind]) + 1) for kind, share in SWEEPS.get(stage, ())]
        # the last kill after another one comes early in what is left of the stage: however little, it has six events
        count, early = counts["any"], ("any", chance.randint(3, 6))
        if often == "twice":
            kills += [("any", chance.randint(count // 2, count - 1)), early]
        elif kills:
            kills = [kills[0], early]
        else:  # just before a file gets its final name, which leaves one of another name
            half = [n for name, kind, n, what in events if (name, kind) == (stage, "any") and "before replace" in what]
            kills = [("any", chance.choice(half))]
        for kind, number in kills:
            code = attempt([*command, "--out", str(folder / "killed")], output, kill=(stage, kind, number))
            history.append({"stage": stage, "kind": kind, "event": number, "of": counts[kind], "code": code,
                            "left": leftovers(folder / "killed")})  # fmt: skip
    final = attempt([*command, "--out", str(folder / "killed")], output)
    print(json.dumps({"history": history, "final": final}))


# The tests


@pytest.fixture(scope="module", params=["once", pytest.param("twice", marks=pytest.mark.slow)])
def runs(request, tiny_model, prompts_file, small_config, made_once):
    """The folder of both runs, and what happened to the second one: killed once a stage and kind of sweep, or twice."""
    if sys.platform != "linux":
        pytest.skip("forks processes that have imported torch")
    options = (tiny_model, "--config", small_config, "--prompts", prompts_file, "--keep", 0.8, "--set", "device=cpu")

    def make(folder):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [str(word) for word in (sys.executable, __file__, folder, request.param, *options)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        output = (folder / "output.txt").read_text()[-3000:] if (folder / "output.txt").exists() else ""
        assert result.returncode == 0, result.stderr + output
        (folder / "told.json").write_text(result.stdout.splitlines()[-1])
        assert json.loads((folder / "told.json").read_text())["final"] == 0, output

    folder = made_once(f"killed-{request.param}", make)
    return folder, json.loads((folder / "told.json").read_text())["history"], request.param


def stable(value):
    """JSON without times and memory."""
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if not k.startswith(VOLATILE)}
    return [stable(v) for v in value] if isinstance(value, list) else value


def test_every_stage_was_killed_inside(runs):
    _, history, often = runs
    kills = [*STAGES, *SWEEPS] if often == "once" else [*STAGES, *STAGES, *(s for s in SWEEPS for _ in SWEEPS[s])]
    assert [row["code"] for row in history] == [-signal.SIGKILL] * len(kills), history
    assert sorted(row["stage"] for row in history) == sorted(kills)
    assert any(row["left"] for row in history)  # otherwise the test below would prove nothing


def test_a_killed_run_ends_as_the_undisturbed_one_bit_for_bit(runs):
    folder, *_ = runs
    assert leftovers(folder / "killed") == []
    names = [
        {str(p.relative_to(folder / run)) for p in (folder / run).rglob("*") if p.is_file()}
        for run in ("undisturbed", "killed")
    ]
    assert names[0] == names[1]
    assert {"plan.json", "bundle/tuned.safetensors", "eval/metrics.json", "eval/student/seed-0/0000.png"} < names[0]
    for name in sorted(names[0]):
        first, second = folder / "undisturbed" / name, folder / "killed" / name
        if name in JOURNAL:
            continue
        if name in ("analysis.json", "candidates.json", "eval/metrics.json"):
            assert stable(json.loads(first.read_text())) == stable(json.loads(second.read_text())), name
        else:
            assert first.read_bytes() == second.read_bytes(), name


def test_the_same_log(runs):
    from ppcl.eval.report_data import read_log

    folder, *_ = runs
    logs = [read_log(folder / run / "log.jsonl") for run in ("undisturbed", "killed")]
    assert {"fit", "distill.local", "distill.output"} <= set(logs[0])
    assert stable(logs[0]) == stable(logs[1])


if __name__ == "__main__":
    act(*sys.argv[1:])
