"""The command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ppcl import __version__
from ppcl.cli.options import (
    Budgets,
    Files,
    Fit,
    Keep,
    Methods,
    Mode,
    Model,
    Out,
    Private,
    Processes,
    Prompts,
    PushTo,
    Seeds,
    Sets,
    Speedup,
    Table,
    check_push,
    open_run,
    push_folder,
    quiet_libraries,
    resolve,
    skip_peft,
)
from ppcl.config import ExportConfig, RunConfig, load_config, parse_seeds, parse_size
from ppcl.errors import ConfigError
from ppcl.run.stages import FUNCTIONS, STAGES
from ppcl.training.launch import guarded, refuse_several

logger = logging.getLogger(__name__)
app = typer.Typer(
    help="Halve a diffusion transformer and get back a pipeline that drops into diffusers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def compress(
    model: Model,
    out: Out,
    config: Files = None,
    set_: Sets = None,
    prompts: Prompts = None,
    keep: Keep = None,
    speedup: Speedup = None,
    fit: Fit = None,
    mode: Mode = None,
    push_to_hub: PushTo = None,
    private: Private = False,
    processes: Processes = None,
) -> None:
    """Run all stages: capture, analyze, fit, plan, distill, export, evaluate, report."""
    from ppcl.run.summary import print_prediction, print_summary

    check_push(push_to_hub, private)
    run = open_run(model, out, config, set_, prompts, keep, speedup, fit, mode, processes)
    for number, stage in enumerate(STAGES, 1):
        typer.echo(f"[{number}/{len(STAGES)}] {stage}", err=True, nl=False)
        typer.echo(": done before" if run.is_done(stage) else "", err=True)
        run.run(stage)
        if stage == "plan":
            print_prediction(run.out)
    if run.group.is_main:
        print_summary(run.out)
        push_folder(run.out / "pipeline", push_to_hub, private)
    run.group.close()


@app.command()
def demo(out: Annotated[Path, typer.Option("--out")] = Path("runs/demo")) -> None:
    """Compress the embedded text-to-emoji teacher to 30% of its parameters; about seven minutes on two cores.

    The pipeline takes its code along, so that diffusers loads it where ppcl is not installed.
    """
    compress("emoji", out, set_=["export.remote_code=true"], keep=0.3)


def _export_command(
    model: Model,
    out: Out,
    config: Files = None,
    set_: Sets = None,
    prompts: Prompts = None,
    keep: Keep = None,
    speedup: Speedup = None,
    fit: Fit = None,
    mode: Mode = None,
    push_to_hub: PushTo = None,
    private: Private = False,
) -> None:
    """Stage: Write the pipeline, and push it to the hub if asked.

    With a finished run in the model's place: ppcl export RUN --keep 0.7 --out DIR writes another size of its bundle.
    """
    if (Path(model) / "bundle").is_dir():
        if prompts is not None or mode is not None:
            raise ConfigError("--prompts and --mode are the run's own; leave them out to export another size")
        check_push(push_to_hub, private)
        _export_size(Path(model), out, keep, speedup, fit, load_config(config or [], set_ or []))
        push_folder(out, push_to_hub, private)
        return
    check_push(push_to_hub, private)
    run = open_run(model, out, config, set_, prompts, keep, speedup, fit, mode)
    _run_stage(run, "export")
    push_folder(run.out / "pipeline", push_to_hub, private)


def _export_size(
    folder: Path, out: Path, keep: float | None, speedup: float | None, fit: str | None, config: RunConfig
) -> None:
    """Write another size of a finished run's bundle; of the config ``export`` counts, and the device."""
    given = {"keep": keep, "speedup": speedup, "fit_gb": parse_size(fit) if fit else None}
    chosen = [(name, value) for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ConfigError(f"give one budget, got {len(chosen)}: one of --keep, --speedup and --fit")
    quiet_libraries()
    from ppcl.experiments.ladder import export_size
    from ppcl.run.summary import describe_plan

    if config.model_copy(update={"export": ExportConfig(), "device": "auto"}) != RunConfig():  # type: ignore[call-arg]
        raise ConfigError("the bundle is there: of the settings export.* and device count alone; leave out the others")
    device = "cpu" if config.device == "auto" else config.device
    made = export_size(folder, out, *chosen[0], device, config.export)
    p = made.plan.predicted
    typer.echo(f"plan: {describe_plan(made.plan)}\n{p.params / 1e6:.2f}M parameters ({p.param_ratio:.1%}) in {out}")


def _run_stage(run: Any, stage: str) -> None:
    ran = run.run(stage)
    typer.echo(f"{stage}: {'done' if ran else 'done before'} in {run.out}")
    run.group.close()


def _evaluate_command(
    models: Annotated[list[str], typer.Argument(help="pipeline folders, hub ids, runs, bundles, or 'emoji'")],
    out: Out,
    config: Files = None,
    set_: Sets = None,
    prompts: Prompts = None,
    reference: Annotated[Path | None, typer.Option("--reference", help="real pictures, or their .npz")] = None,
    keep: Keep = None,
    speedup: Speedup = None,
    fit: Fit = None,
    mode: Mode = None,
) -> None:
    """Stage: Pictures and numbers. Or judge models: ppcl evaluate A [B ...] --out DIR compares each B with A.

    A finished run in a model's place stands for its compressed pipeline, alone for its teacher and that.
    """
    if len(models) == 1 and reference is None and (out / "stages.json").is_file():
        _run_stage(open_run(models[0], out, config, set_, prompts, keep, speedup, fit, mode), "evaluate")
        return
    if any(option is not None for option in (keep, speedup, fit, mode)):
        logger.warning("--keep, --speedup, --fit and --mode have no effect on the evaluation of finished models")
    quiet_libraries()
    from ppcl.eval.judge import judge_command
    from ppcl.run.summary import print_evaluation

    print_evaluation(judge_command(models, out, config or [], set_ or [], prompts, reference), out)


def _report_command(
    model: Annotated[str, typer.Argument(help="as the run was given, with --out; or a finished folder alone")],
    out: Annotated[Path | None, typer.Option("--out", help="the run directory")] = None,
    config: Files = None,
    set_: Sets = None,
    prompts: Prompts = None,
    keep: Keep = None,
    speedup: Speedup = None,
    fit: Fit = None,
    mode: Mode = None,
) -> None:
    """Stage: The report, as a page and as Markdown. Or of a finished folder: ppcl report DIR.

    DIR is what ppcl compress or ppcl evaluate got as --out.
    """
    if out is not None:
        _run_stage(open_run(model, out, config, set_, prompts, keep, speedup, fit, mode), "report")
        return
    if any(option is not None for option in (config, set_, prompts, keep, speedup, fit, mode)):
        logger.warning("options of a run have no effect on the report of a finished folder")
    from ppcl.eval.report import rewrite

    typer.echo(f"report:  {rewrite(Path(model))}")


def _stage_command(stage: str) -> None:
    def command(
        model: Model,
        out: Out,
        config: Files = None,
        set_: Sets = None,
        prompts: Prompts = None,
        keep: Keep = None,
        speedup: Speedup = None,
        fit: Fit = None,
        mode: Mode = None,
        processes: Processes = None,
    ) -> None:
        _run_stage(open_run(model, out, config, set_, prompts, keep, speedup, fit, mode, processes), stage)

    command.__doc__ = f"Stage: {FUNCTIONS[stage].__doc__}"
    app.command(name=stage)(command)


for _stage in STAGES:
    if _stage == "export":
        app.command(name=_stage)(_export_command)
    elif _stage == "evaluate":
        app.command(name=_stage)(_evaluate_command)
    elif _stage == "report":
        app.command(name=_stage)(_report_command)
    else:
        _stage_command(_stage)


@app.command()
def compare(
    model: Model,
    out: Out,
    config: Files = None,
    set_: Sets = None,
    prompts: Prompts = None,
    keep: Keep = None,
    table: Table = None,
    seeds: Seeds = "0",
    methods: Methods = None,
    budgets: Budgets = None,
) -> None:
    """Compare plans under one budget and the same training steps; or every method, with --methods. One table."""
    chosen = parse_seeds(seeds)
    if methods is None and budgets is not None:
        raise ConfigError("--budgets needs --methods; without it all plans have one budget, e.g. --keep 0.6")
    if methods is not None and keep is not None:
        raise ConfigError(f"--keep has no effect with --methods; write --budgets keep={keep:g}")
    run = open_run(model, out, config, set_, prompts, keep)
    if methods is not None:
        from ppcl.experiments.methods import BUDGETS, budgets_named, compare_methods, methods_named

        typer.echo(compare_methods(run, methods_named(methods), budgets_named(budgets or BUDGETS), chosen, table))
        return
    from ppcl.experiments.compare import compare_plans

    typer.echo(compare_plans(run, table, chosen))


@app.command()
def ablate(
    model: Model,
    out: Out,
    config: Files = None,
    set_: Sets = None,
    prompts: Prompts = None,
    keep: Keep = None,
    table: Table = None,
    seeds: Seeds = "0",
) -> None:
    """Add the paper's ingredients one by one, with the same training steps; one table."""
    chosen = parse_seeds(seeds)
    run = open_run(model, out, config, set_, prompts, keep)
    from ppcl.experiments.ablation import ablate as run_ablation

    typer.echo(run_ablation(run, table, chosen))


@app.command()
def ladder(
    model: Model,
    out: Out,
    config: Files = None,
    set_: Sets = None,
    prompts: Prompts = None,
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
    run = open_run(model, out, config, set_, prompts, keep)
    from ppcl.experiments.ladder import measure_ladder

    typer.echo(measure_ladder(run, shares, table))


@app.command()
def study(
    model: Model,
    out: Out,
    config: Files = None,
    set_: Sets = None,
    prompts: Prompts = None,
    keep: Keep = None,
    table: Table = None,
    draws: Annotated[int, typer.Option("--draws", min=2, help="random removals of each size and kind")] = 12,
    seeds: Seeds = "0,1",
) -> None:
    """Test the paper's observations on this teacher: contiguity, non-sequential training, predictions."""
    chosen = parse_seeds(seeds)
    run = open_run(model, out, config, set_, prompts, keep)
    from ppcl.experiments.study import study as run_study

    typer.echo(run_study(run, table, draws, chosen))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="'emoji', a pipeline folder, a hub id, or a transformer's config.json")],
    config: Files = None,
    set_: Sets = None,
    keep: Keep = None,
    speedup: Speedup = None,
    height: Annotated[int | None, typer.Option("--height", min=1, help="of the picture, pixels")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="of the picture, pixels")] = None,
    text_tokens: Annotated[int | None, typer.Option("--text-tokens", min=1, help="of the prompt")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="of modulation: what width could give")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show blocks, parameters and a ladder of sizes, from the model's config files alone."""
    settings = resolve(model, config, set_, keep, speedup, None, None)
    quiet_libraries()
    if "torch" not in sys.modules:  # a process that only looks at configs
        skip_peft()
    import json

    from ppcl.common.artifacts import to_jsonable
    from ppcl.inspection.model import inspect_model, report

    height, width = height or settings.capture.height, width or settings.capture.width
    found = inspect_model(model, settings.plan, settings.fit.max_run, height, width, text_tokens, rank)
    typer.echo(json.dumps(to_jsonable(found), indent=1) if json_ else report(found))


@app.command()
def families(
    table: Table = None,
) -> None:
    """List the transformer classes of the installed diffusers: supported, inferred, refused (why)."""
    quiet_libraries()
    from ppcl.common.files import write_text
    from ppcl.teacher.families.listing import family_table

    text = family_table()
    if table:
        write_text(table, f"# Supported transformers\n\n{text}\n\nCommand: `ppcl families --table {table}`\n")
    typer.echo(text)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Halve a diffusion transformer and get back a pipeline that drops into diffusers."""
    if context.invoked_subcommand not in ("compress", *(stage for stage in STAGES if stage != "export")):
        refuse_several(context.invoked_subcommand)


def main() -> None:
    """Entry point."""
    guarded(app)


if __name__ == "__main__":
    main()
