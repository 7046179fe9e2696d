"""The benchmarks' own mains, as little as possible of each, on the tiny pipeline."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from tiny_models import flux_call, tiny_flux

from ppcl.pruning.knapsack import Edge
from ppcl.student.plan import Segment

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tiny_model, prompts_file, small_config, tmp_path):
    """Run a benchmark's main on the tiny pipeline; returns the table that it wrote."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()

    def run(name, *extra):
        table = tmp_path / f"{name}.md"
        where = ["--model", str(tiny_model), "--prompts", str(prompts_file), "--config", str(small_config)]
        importlib.import_module(name).main([*where, "--quick", "--threads", "1", "--table", str(table), *extra])
        return table.read_text()

    yield run
    torch.set_num_threads(threads)


def cells(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_full_size(benchmark):
    text = benchmark("full_size", "--repeats", "1")
    assert "SCALED DOWN" in text  # there is no GPU, or it was not asked for
    for start in ("Qwen-Image, depth", "Qwen-Image, width", "FLUX.1, depth"):
        row = cells(text, start)
        assert float(row[2]) > 1  # predicted to be faster, and smaller than the teacher
        assert float(row[5]) < float(cells(text, f"{start.split(',')[0]}: teacher")[5])
        assert abs(float(row[7].rstrip("%"))) < 10  # the peak is counted, so it does not depend on the machine


@pytest.mark.slow
def test_the_stages_at_full_size_by_arithmetic(benchmark):
    text = benchmark("full_size", "--estimate")
    assert "## Qwen/Qwen-Image" in text
    (line, _) = [line for line in text.splitlines() if line.startswith("| all")]
    assert float(line.split("|")[2]) < 24  # GB of a card of 24
    assert "hours of one H100" in text


@pytest.mark.slow
def test_a_local_step_at_full_size(benchmark):
    text = benchmark("full_size", "--local-step", "--repeats", "1")
    assert "SCALED DOWN" in text
    for model in ("Qwen-Image", "FLUX.1"):
        rows = [cells(text, f"{model}, 64 px, {way}") for way in ("all at once", "gradients released", "one at a time")]
        peaks = [float(row[2]) for row in rows]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[2] < 0.5 * peaks[0]
        assert all(abs(float(row[3].rstrip("%"))) < 10 for row in rows)  # counted, so the same on every machine


def test_naive_loop_takes_more_memory(benchmark):
    text = benchmark("naive_loop")
    ours, held = (float(cells(text, start)[4]) for start in ("ppcl |", "ppcl, distill.release_gradients=false"))
    assert ours < held < 1


def test_analysis_cost(benchmark):
    text = benchmark("analysis_cost")
    assert cells(text, "bare teacher passes")[2] == "1.00"
    assert float(cells(text, "analyze stage")[1]) > 0
    assert float(cells(text, "sums and tokens")[3]) < 1.5  # while there are several times as many states
    assert "Device:" in text and "Versions:" in text and "--quick" in text


def test_distill_step_holds_one_graph(benchmark):
    text = benchmark("distill_step")
    assert cells(text, "ideal")[2] == "1.00"
    memory = text[text.index("Activation memory") :]
    assert float(cells(memory, "one local step")[2]) == pytest.approx(1, abs=0.05)
    assert float(cells(memory, "ordinary way")[2]) > 1.5


@pytest.mark.slow
def test_scaling_counts_the_processes(benchmark):
    text = benchmark("scaling", "--steps", "3", "--processes", "2")
    stages, joint = text.split("## Joint training")
    for part in (stages, joint):
        assert cells(part, "2")[2] == "1.00"  # times as fast as the first number of processes that is asked for
        assert float(cells(part, "2")[1]) > 0


@pytest.mark.slow
def test_ways_of_recovery(monkeypatch, tiny_model, finished_run, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    arguments = [
        finished_run,
        tmp_path / "table.md",
        "--model",
        tiny_model,
        "--keeps",
        "0.8",
        "--states",
        "8",
        "--quick",
    ]
    importlib.import_module("correction").main([*map(str, arguments)])
    torch.set_num_threads(threads)
    text = (tmp_path / "table.md").read_text()
    assert cells(text, "nothing")[1] == cells(text, "nothing")[4] == ""
    carried, output, light = (cells(text, f"local, {way} ") for way in ("carried for", "output for", "output by LoRA,"))
    assert (carried[1], output[1]) == ("60", "120")
    peaks = [float(row[4]) for row in (carried, light, output)]
    assert peaks[0] < peaks[2] and peaks[1] < peaks[2]


@pytest.mark.slow
def test_a_model_from_end_to_end(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    table = tmp_path / "table.md"
    importlib.import_module("end_to_end").main(["--models", "FLUX.1 Fill", "--table", str(table)])
    row = cells(table.read_text(), "FLUX.1 Fill")
    assert row[1] == "FluxTransformer2DModel" and row[2] == "modulation, ffn, attention, text"
    assert 0.5 < float(row[5]) <= 0.6 and row[6].isdigit() and row[7:] == ["0", "loads, draws"]


def test_diffusers_tests_work_on_models_with_a_smaller_part_of_each_kind(monkeypatch):
    """What a class of tests of theirs gets instead: the compressed class, and what of it is smaller."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plugin = importlib.import_module("diffusers_tests")

    class Tests:
        model_class = FluxTransformer2DModel

        def get_init_dict(self):
            return {k: v for k, v in tiny_flux(1, 1).config.items() if not k.startswith("_")}

        def get_dummy_inputs(self):
            return flux_call(seed=0)

    plugin.replace_model(Tests, plugin.Pruned())
    model = Tests.model_class(**Tests().get_init_dict())
    assert type(model).__name__ == "PPCLFluxTransformer2DModel"
    assert {part["kind"] for part in model.config["pruning"].values()} == {"low_rank", "narrow", "heads", "parallel"}
    assert model(**Tests().get_dummy_inputs(), return_dict=False)[0].isfinite().all()


@pytest.mark.slow
def test_streamed_run(benchmark):
    text = benchmark("streamed_run", "--blocks", "4", "--until", "analyze")
    rows = [line for line in text.splitlines() if line.startswith("| 4 (")]
    stages = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    assert [row[1] for row in stages] == ["capture", "analyze"], text
    assert all(float(row[2]) > 0.1 and float(row[4]) > 0 and not row[5] for row in stages), text
    assert "Width 256" in text


def test_prices_of_a_family(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    importlib.import_module("prices").main([str(tmp_path / "prices.md"), "--families", "qwen"])
    number, rank, median = cells((tmp_path / "prices.md").read_text(), "qwen")[1:4]
    assert int(number) > 40
    assert float(rank) > 0.95
    assert 0.8 < float(median) < 1.2


def test_random_plans_hold_what_was_asked_for_and_nothing_twice(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    predictions = importlib.import_module("predictions")
    runs = [Edge(i, j, 1.0, 0.0, "a", Segment(i, j), 0.0) for i in range(12) for j in range(i + 1, min(i + 4, 12))]
    blocks = [Edge(i, i, 1.0, 0.0, "a", Segment(i, i, width={"ffn": {}}), 0.0) for i in range(12) for _ in range(3)]
    edges, generator = [*runs, *blocks], np.random.default_rng(0)
    for sizes in ((4, 0), (0, 9), (3, 2)):
        for _ in range(20):
            chosen = [edges[n] for n in predictions.random_route(edges, *sizes, generator)]
            places = [place for edge in chosen for place in range(edge.first, edge.last + 1)]
            assert places == sorted(set(places))
            found = sum(edge.segment.is_run for edge in chosen)
            assert (found, len(chosen) - found) == sizes
    with pytest.raises(AssertionError, match="no room"):
        predictions.random_route(runs[:1], 2, 0, generator)


def test_every_table_of_make_tables_has_its_command(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = importlib.import_module("tables")
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    names = makefile.partition("TABLES = ")[2].partition("tables:")[0].replace("\\", " ").split()
    assert "results" in names
    for name in names:
        command = tables.command_of(name)
        assert any(f"docs/{name}.md" in argument for argument in command)
        assert not any("RUN" in argument for argument in command)
    with pytest.raises(SystemExit, match="names no command for nothing"):
        tables.command_of("nothing")


def test_tables_that_were_made_are_not_made_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = importlib.import_module("tables")
    ran, codes = [], iter([0, 3, 0])

    def run(command, **_):
        ran.append(command[-1])
        return tables.subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(tables.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["tables.py", "ladder", "ablation", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        tables.main()
    assert stopped.value.code == 3
    tables.main()
    assert ran == ["docs/ladder.md", "docs/ablation.md", "docs/ablation.md"]


def test_results_put_runs_beside_each_other(monkeypatch, finished_run, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    results = importlib.import_module("results")
    monkeypatch.setattr(results, "finished", lambda name, out: finished_run)
    written = ["--table", str(tmp_path / "results.md"), "--picture", str(tmp_path / "pictures.png")]
    monkeypatch.setattr("sys.argv", ["results.py", *written])
    results.main()
    with Image.open(tmp_path / "pictures.png") as picture:
        assert picture.width > 2 * 100
    text = (tmp_path / "results.md").read_text()
    held = json.loads((finished_run / "eval" / "metrics.json").read_text())
    teacher, student = held["models"]
    row = cells(text, "parameters of the transformer")
    assert row[2] == f"{teacher['params']:,}"
    assert row[3] == row[5] == f"{student['params']:,} ({student['params'] / teacher['params']:.1%})"
    for start in ("Average drop", "Diversity", "Velocity error", "Texture distance", "seconds"):
        assert float(cells(text, start)[3].split()[0]) or start == "Average drop"
    assert "Device:" in text
