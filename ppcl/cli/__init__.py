"""The command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ppcl import __version__
from ppcl.cli.options import (
    Budget,
    Component,
    Keep,
    Model,
    OtherFormat,
    Out,
    Processes,
    Push,
    Rounds,
    Seeds,
    Settings,
    Table,
    Teacher,
    expanded,
    open_rounds,
    open_run,
    quiet_libraries,
    resolve,
    skip_peft,
)
from ppcl.config import ExportConfig, RunConfig, load_config, parse_seeds
from ppcl.errors import ConfigError, UserError
from ppcl.run.stages import STAGES
from ppcl.training.launch import check_launcher, guarded, refuse_several

logger = logging.getLogger(__name__)
app = typer.Typer(
    help="Halve a diffusion transformer and get back a pipeline that drops into diffusers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _command(function: Any) -> Any:
    """Register a command whose options stand in dataclasses."""
    app.command()(expanded(function))
    return function


@_command
def compress(
    model: Model,
    out: Out,
    settings: Settings,
    budget: Budget,
    push: Push,
    component: Component = None,
    rounds: Rounds = None,
    processes: Processes = None,
) -> None:
    """Run all stages: capture, analyze, fit, plan, distill, export, evaluate, report."""
    from ppcl.run.summary import print_prediction, print_summary

    push.check()
    for step in open_rounds(model, out, settings, budget, processes, rounds, component):
        run = step.run
        if step.title:
            typer.echo(step.title, err=True)
        expected, taken = {} if run.first or run.is_done("fit") else _look_ahead(run), dict[str, float]()
        for number, stage in enumerate(step.stages, 1):
            typer.echo(f"[{number}/{len(step.stages)}] {stage}", err=True, nl=False)
            typer.echo(": done before" if run.is_done(stage) else _time_left(expected, taken, step.stages), err=True)
            began = time.monotonic()
            ran = run.run(stage)
            taken[stage] = time.monotonic() - began if ran else 0.0
            if stage == "plan":
                print_prediction(run.out)
    if run.group.is_main:
        print_summary(run.out)
        push.upload(run.out / "pipeline")
    run.group.close()


def _look_ahead(run: Any) -> dict[str, float]:
    """Refuse a budget that no plan can meet, and say what the stages will take; the seconds of each."""
    from ppcl.run.outlook import check_budget, outlook

    check_budget(run)
    if not run.group.is_main:
        return {}
    lines, seconds = outlook(run)
    typer.echo("\n".join(lines), err=True)
    return seconds


def _time_left(expected: dict[str, float], taken: dict[str, float], stages: Iterable[str]) -> str:
    from ppcl.inspection.estimate import time_text
    from ppcl.run.outlook import time_left

    left = time_left({stage: expected[stage] for stage in stages if stage in expected}, taken)
    return "" if left is None else f": about {time_text(left)} left of all stages"


@app.command()
def demo(out: Annotated[Path, typer.Option("--out")] = Path("runs/demo")) -> None:
    """Compress the embedded text-to-emoji teacher to half of its parameters; about four minutes on two cores.

    The pipeline takes its code along, so that diffusers loads it where ppcl is not installed.
    """
    compress("emoji", out, Settings(overrides=["export.remote_code=true"]), Budget(keep=0.5), Push())


def _run_stage(run: Any, stage: str) -> None:
    ran = run.run(stage)
    typer.echo(f"{stage}: {'done' if ran else 'done before'} in {run.out}")
    run.group.close()


def _export_command(
    model: Model,
    out: Out,
    settings: Settings,
    budget: Budget,
    push: Push,
    other: OtherFormat,
    teacher: Teacher = None,
) -> None:
    """Stage: Write the pipeline, and push it to the hub if asked.

    With a finished run in the model's place: ppcl export RUN --keep 0.7 --out DIR writes another size of its bundle.
    Of a run or a pipeline folder: ppcl export RUN --format gguf --out FILE writes the transformer for other programs.
    """
    if other.is_given():
        if not (settings.is_empty and budget.is_empty and push == Push()):
            raise ConfigError("--format converts what is written already; leave out all options but --out, --gguf-type")
        _export_format(model, out, other)
        return
    push.check()
    if (Path(model) / "bundle").is_dir():
        if settings.prompts is not None or budget.mode is not None:
            raise ConfigError("--prompts and --mode are the run's own; leave them out to export another size")
        config = load_config(settings.config or [], settings.overrides or [])
        _export_size(Path(model), out, budget, config, teacher)
        push.upload(out)
        return
    if teacher is not None:
        logger.warning("--teacher has no effect without a run in the model's place")
    run = open_run(model, out, settings, budget)
    _run_stage(run, "export")
    push.upload(run.out / "pipeline")


def _export_format(model: str, out: Path, other: OtherFormat) -> None:
    quiet_libraries()
    from ppcl.export.formats import export_as

    written = export_as(model, out, str(other.format), other.gguf_type or "F16")
    typer.echo(f"{written.parameters / 1e6:.2f}M parameters in {out}")
    if written.multiplied_out:
        typer.echo(
            f"{written.multiplied_out} smaller modules are multiplied out to stock shapes: this saves the depth alone"
        )
    if written.load:
        typer.echo(f"load: {written.load}")


def _export_size(folder: Path, out: Path, budget: Budget, config: RunConfig, teacher: str | None) -> None:
    """Write another size of a finished run's bundle; of the config ``export`` counts, and the device."""
    budgets = budget.given()
    if len(budgets) != 1:
        raise ConfigError(f"give one budget, got {len(budgets)}: one of --keep, --speedup and --fit")
    ((kind, value),) = budgets.items()
    quiet_libraries()
    from ppcl.experiments.ladder import export_size
    from ppcl.run.summary import describe_plan

    if config.model_copy(update={"export": ExportConfig(), "device": "auto"}) != RunConfig():  # type: ignore[call-arg]
        raise ConfigError("the bundle is there: of the settings export.* and device count alone; leave out the others")
    device = "cpu" if config.device == "auto" else config.device
    bundle = export_size(folder, out, kind, value, device, config.export, teacher)
    p = bundle.plan.predicted
    typer.echo(f"plan: {describe_plan(bundle.plan)}\n{p.params / 1e6:.2f}M parameters ({p.param_ratio:.1%}) in {out}")


def _evaluate_command(
    models: Annotated[list[str], typer.Argument(help="pipeline folders, hub ids, runs, bundles, or 'emoji'")],
    out: Out,
    settings: Settings,
    budget: Budget,
    reference: Annotated[Path | None, typer.Option("--reference", help="real pictures, or their .npz")] = None,
    teacher: Teacher = None,
) -> None:
    """Stage: Pictures and numbers. Or judge models: ppcl evaluate A [B ...] --out DIR compares each B with A.

    A finished run in a model's place stands for its compressed pipeline, alone for its teacher and that.
    """
    if len(models) == 1 and reference is None and (out / "stages.json").is_file():
        _run_stage(open_run(models[0], out, settings, budget), "evaluate")
        return
    if not budget.is_empty:
        logger.warning("--keep, --speedup, --fit and --mode have no effect on the evaluation of finished models")
    quiet_libraries()
    from ppcl.eval.command import evaluate_command
    from ppcl.run.summary import print_evaluation

    files, overrides = settings.config or [], settings.overrides or []
    print_evaluation(evaluate_command(models, out, files, overrides, settings.prompts, reference, teacher))
    typer.echo(f"report:  {out / 'report.html'}")


def _report_command(
    model: Annotated[str, typer.Argument(help="as the run was given, with --out; or a finished folder alone")],
    settings: Settings,
    budget: Budget,
    out: Annotated[Path | None, typer.Option("--out", help="the run directory")] = None,
) -> None:
    """Stage: The report, as a page and as Markdown. Or of a finished folder: ppcl report DIR.

    DIR is what ppcl compress or ppcl evaluate got as --out.
    """
    if out is not None:
        _run_stage(open_run(model, out, settings, budget), "report")
        return
    if not (settings.is_empty and budget.is_empty):
        logger.warning("options of a run have no effect on the report of a finished folder")
    from ppcl.eval.report import rewrite

    typer.echo(f"report:  {rewrite(Path(model))}")


def _stage_command(stage: str) -> Any:
    def command(model: Model, out: Out, settings: Settings, budget: Budget, processes: Processes = None) -> None:
        _run_stage(open_run(model, out, settings, budget, processes), stage)

    command.__doc__ = f"Stage: {STAGES[stage].summary}"
    return command


_SPECIAL: dict[str, Any] = {"export": _export_command, "evaluate": _evaluate_command, "report": _report_command}
for _name in STAGES:
    app.command(name=_name)(expanded(_SPECIAL.get(_name) or _stage_command(_name)))


def _run_for_table(model: str, out: Path, settings: Settings, keep: float | None, stage: str = "fit") -> Any:
    """The run that a table starts from, done up to a stage; the directory is this process's until it ends."""
    run = open_run(model, out, settings, Budget(keep=keep))
    run.through(stage)
    run.hold()
    return run


@_command
def compare(
    model: Model,
    out: Out,
    settings: Settings,
    keep: Keep = None,
    table: Table = None,
    seeds: Seeds = "0",
    methods: Annotated[str | None, typer.Option("--methods", help="all, or some, e.g. ours,path,units-wanda")] = None,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", help="of --methods; keep=0.84,keep=0.7,keep=0.5,speedup=1.5 if left out"),
    ] = None,
) -> None:
    """Compare plans under one budget and the same training steps; or every method, with --methods. One table."""
    training_seeds = parse_seeds(seeds)
    if methods is None and budgets is not None:
        raise ConfigError("--budgets needs --methods; without it all plans have one budget, e.g. --keep 0.6")
    if methods is not None and keep is not None:
        raise ConfigError(f"--keep has no effect with --methods; write --budgets keep={keep:g}")
    if methods is not None:
        from ppcl.experiments.methods import BUDGETS, budgets_named, compare_methods, methods_named

        named, wanted = methods_named(methods), budgets_named(budgets or BUDGETS)  # before hours of work
        run = _run_for_table(model, out, settings, keep)
        typer.echo(compare_methods(run, named, wanted, training_seeds, table))
        return
    from ppcl.experiments.compare import compare_plans

    typer.echo(compare_plans(_run_for_table(model, out, settings, keep), table, training_seeds))


@_command
def ablate(
    model: Model, out: Out, settings: Settings, keep: Keep = None, table: Table = None, seeds: Seeds = "0"
) -> None:
    """Add the paper's ingredients one by one, with the same training steps; one table."""
    training_seeds = parse_seeds(seeds)
    run = _run_for_table(model, out, settings, keep)
    from ppcl.experiments.ablation import ablate as run_ablation

    typer.echo(run_ablation(run, table, training_seeds))


@_command
def ladder(
    model: Model,
    out: Out,
    settings: Settings,
    keep: Keep = None,
    keeps: Annotated[str, typer.Option("--keeps", help="shares of the parameters")] = "0.8,0.7,0.6,0.5",
    table: Table = None,
) -> None:
    """Score one bundle at several sizes, without training again; one table."""
    try:
        shares = sorted((float(part) for part in keeps.split(",")), reverse=True)
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"--keeps {keeps!r} is not a list of shares between 0 and 1; write it like 0.8,0.6")
    run = _run_for_table(model, out, settings, keep, "distill")
    from ppcl.experiments.ladder import measure_ladder

    typer.echo(measure_ladder(run, shares, table))


@_command
def study(
    model: Model,
    out: Out,
    settings: Settings,
    keep: Keep = None,
    table: Table = None,
    draws: Annotated[int, typer.Option("--draws", min=2, help="random removals of each size and kind")] = 12,
    seeds: Seeds = "0,1",
) -> None:
    """Test the paper's observations on this teacher: contiguity, non-sequential training, predictions."""
    training_seeds = parse_seeds(seeds)
    run = _run_for_table(model, out, settings, keep)
    from ppcl.experiments.study import study as run_study

    typer.echo(run_study(run, table, draws, training_seeds))


@_command
def teacher(
    model: Annotated[str, typer.Argument(help="a transformer's folder, .safetensors or .gguf file; or a pipeline")],
    out: Annotated[Path, typer.Option("--out", help="the pipeline folder to write")],
    base: Annotated[
        str | None, typer.Option("--base", help="the pipeline that the transformer belongs to, e.g. Qwen/Qwen-Image")
    ] = None,
    lora: Annotated[list[str] | None, typer.Option("--lora", help="fold it in; may be given several times")] = None,
    lora_scale: Annotated[float, typer.Option("--lora-scale", help="of each --lora")] = 1.0,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16")] = "auto",
    trim: Annotated[
        bool, typer.Option("--trim-text-encoders", help="leave out their last layers, as far as nothing reads them")
    ] = False,
) -> None:
    """Put together a pipeline that can be compressed: of one file, a GGUF, quantised weights, with LoRAs folded in."""
    quiet_libraries()
    from ppcl.export.assembled import assemble_teacher

    typer.echo(f"ppcl compress {assemble_teacher(model, out, base, lora or [], lora_scale, dtype, trim)} --out RUN")


@_command
def inspect(
    model: Annotated[str, typer.Argument(help="'emoji', a pipeline folder, a hub id, or a transformer's config.json")],
    settings: Settings,
    component: Component = None,
    keep: Keep = None,
    speedup: Annotated[float | None, typer.Option("--speedup", help="predicted speed-up, e.g. 1.7")] = None,
    height: Annotated[int | None, typer.Option("--height", min=1, help="of the picture, pixels")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="of the picture, pixels")] = None,
    text_tokens: Annotated[int | None, typer.Option("--text-tokens", min=1, help="of the prompt")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="of modulation: what width could give")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="what a run takes: memory, disk, time of each stage")] = (
        False
    ),
    device: Annotated[
        str | None,
        typer.Option("--device", help="of --estimate: 24GB,300TFLOPS (peak of half precision); this one if left out"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show blocks, parameters and a ladder of sizes, or what a run takes, from the model's config files alone."""
    if device is not None and not estimate:
        raise ConfigError("--device is what --estimate counts for; give both")
    config = resolve(model, settings, Budget(keep=keep, speedup=speedup), component=component)
    quiet_libraries()
    if "torch" not in sys.modules:  # a process that only looks at configs
        skip_peft()
    import json

    from ppcl.common.artifacts import to_jsonable
    from ppcl.inspection.blueprint import transformers_of
    from ppcl.inspection.estimate import estimate_reports, estimate_run
    from ppcl.inspection.hardware import hardware_here, parse_hardware
    from ppcl.inspection.model import inspect_model, report

    size = (height or config.capture.height, width or config.capture.width)
    found: list[Any] = []
    for name in transformers_of(model, config.capture.component):
        if estimate:
            hardware = parse_hardware(device) if device else hardware_here(config.device)
            changes = {"height": size[0], "width": size[1], "component": name}
            of_one = {"capture": config.capture.model_copy(update=changes)}
            found.append(estimate_run(model, config.model_copy(update=of_one), hardware, text_tokens))
            continue
        found.append(inspect_model(model, config.plan, config.fit.max_run, *size, text_tokens, rank, name))
    if json_:
        typer.echo(json.dumps(to_jsonable(found[0] if len(found) == 1 else found), indent=1))
    else:
        typer.echo(estimate_reports(found) if estimate else "\n\n".join(map(report, found)))


@app.command()
def settings(table: Table = None) -> None:
    """List all settings of config files and ``--set``: defaults, values, meaning."""
    from ppcl.common.files import write_text
    from ppcl.config.reference import settings_reference

    text = settings_reference()
    if table:
        write_text(table, f"# Settings\n\n{text}\n\nCommand: `ppcl settings --table {table}`\n")
    typer.echo(text)


@app.command()
def families(
    table: Table = None,
    formats: Annotated[bool, typer.Option("--formats", help="which files `export --format` writes of each")] = False,
) -> None:
    """List the transformer classes of the installed diffusers: supported, inferred, refused (why)."""
    quiet_libraries()
    from ppcl.common.files import write_text
    from ppcl.export.support import format_table
    from ppcl.export.trainers import trainer_table
    from ppcl.teacher.families.listing import family_table

    tables = f"{format_table()}\n\n{trainer_table()}" if formats else family_table()
    title, text = "Formats" if formats else "Supported transformers", tables
    if table:
        command = f"ppcl families{' --formats' * formats} --table {table}"
        write_text(table, f"# {title}\n\n{text}\n\nCommand: `{command}`\n")
    typer.echo(text)


@app.command()
def doctor() -> None:
    """Check the installation: versions of packages, device, extras, and which full-size models fit here."""
    import platform

    from ppcl.config.load import CONFIGS
    from ppcl.inspection.doctor import declared_packages, fits_here, package_lines

    packages = declared_packages()
    typer.echo(f"ppcl {__version__}, Python {platform.python_version()}, {platform.platform()}; configs: {CONFIGS}")
    typer.echo("\n".join(["packages:", *package_lines(packages)]))
    if faulty := [str(package) for package in packages if not package.extra and package.state != "ok"]:
        raise UserError(f"packages that ppcl needs: {', '.join(faulty)}; pip install --upgrade ppcl mends them")
    quiet_libraries()
    for line in fits_here(Path.cwd()):
        typer.echo(line)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Halve a diffusion transformer and get back a pipeline that drops into diffusers."""
    if context.invoked_subcommand not in ("compress", *(stage for stage in STAGES if stage != "export")):
        refuse_several(context.invoked_subcommand)
    check_launcher()


def main() -> None:
    """Entry point."""
    guarded(app)


if __name__ == "__main__":
    main()
