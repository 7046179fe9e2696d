"""What halving the embedded teacher costs: three runs of ``ppcl compress emoji`` beside each other.

    python benchmarks/results.py --out runs/results --table docs/results.md --picture docs/pictures.png

Runs that are finished are read; others are done, or go on where they were. Hardware: two CPU
cores; about four minutes a run.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ppcl.common.artifacts import load_artifact
from ppcl.common.files import atomic_path, read_json, write_text
from ppcl.common.folders import LEDGER
from ppcl.common.pictures import open_picture
from ppcl.common.tables import markdown_table, number, provenance
from ppcl.eval.metrics import METRICS
from ppcl.eval.results import Comparison, Evaluation, ModelResult, Number, load_evaluation
from ppcl.run.stage import ORDER
from ppcl.student.plan import CompressionPlan

RUNS = {"half": ("--keep", "0.5"), "third": ("--keep", "0.3"), "fast": ("--speedup", "1.8")}
SHOWN = ("fid", "kid", "clip_score", "retrieval_at_1", "retrieval_at_5", "diversity")
CLOSENESS = ("velocity_error", "psnr", "texture_distance")
AFTERWORD = """
A negative drop is a gain; an interval that holds 0 means that these prompts cannot tell the two apart. FID and KID
compare with {reference}; their floor is what as many of these have to their others. After ±: standard
deviation over {seeds} seeds of pictures. Texture distance, velocity error and PSNR are against the teacher.

What became one block each: {blocks}. {smaller}

What is known beside this: [findings.md](findings.md).
"""


def finished(name: str, out: Path) -> Path:
    """Do a run, or go on with it; return its folder."""
    folder = out / name
    command = [sys.executable, "-m", "ppcl", "compress", "emoji", "--out", str(folder), *RUNS[name]]
    print("+", shlex.join(command[2:]), flush=True)
    subprocess.run(command, check=True)
    return folder


def seconds_of(folder: Path) -> float:
    """What all stages of a run took."""
    ledger = read_json(folder / LEDGER)
    return sum(float(ledger[stage]["seconds"]) for stage in ORDER if stage in ledger)


def table(evaluations: list[Evaluation], plans: list[CompressionPlan], seconds: list[float]) -> str:
    """A row a number, a column a run."""
    teacher, students = evaluations[0].models[0], [one.models[1] for one in evaluations]
    comparisons = [one.comparisons[0] for one in evaluations]

    def spread(name: str) -> str:
        entry = teacher.spread.get(name)
        return f" ± {number(entry.std, 2)}" if entry is not None and entry.std is not None else ""

    def score_row(name: str) -> list[str]:
        floor = number(evaluations[0].floor.get(name))
        first = teacher.numbers.get(name)
        return [
            METRICS[name].heading,
            floor,
            (str(first) if first else "-") + spread(name),
            *(str(s.numbers.get(name, "-")) for s in students),
        ]

    def comparison_row(label: str, teachers: str, value: list[str]) -> list[str]:
        return [label, "", teachers, *value]

    params = [f"{s.params:,} ({s.params / teacher.params:.1%})" for s in students]
    rows = [
        comparison_row("parameters of the transformer", f"{teacher.params:,}", params),
        comparison_row(
            "transformer, measured in turn with the teacher", "1", [_times(row.speedup) for row in comparisons]
        ),
        comparison_row("the same, predicted", "1", [_times(plan.predicted.speedup) for plan in plans]),
        comparison_row("a whole picture, measured", "1", [_times(row.speedup_end_to_end) for row in comparisons]),
        comparison_row(METRICS["average_drop"].heading, "0", [_text(row.average_drop) for row in comparisons]),
        *(score_row(name) for name in SHOWN if name in teacher.numbers),
        comparison_row("FID by the teacher's", "1", [_text(row.fid_ratio) for row in comparisons]),
        comparison_row("diversity by the teacher's", "1", [_text(row.diversity_ratio) for row in comparisons]),
        *(_close(name, comparisons) for name in CLOSENESS),
        comparison_row(
            "velocity error before distillation", "", [number(r.scale.get("velocity_error")) for r in comparisons]
        ),
        comparison_row("seconds of the run", "", [number(value) for value in seconds]),
    ]
    header = ["", "floor", "teacher", *(f"`{' '.join(RUNS[name])}`" for name in RUNS)]
    return markdown_table(header, rows)


def _times(value: float | None) -> str:
    return f"{value:.2f}x" if value is not None else "-"


def _text(entry: Number | None) -> str:
    return str(entry) if entry is not None else "-"


def _close(name: str, comparisons: list[Comparison]) -> list[str]:
    scale = comparisons[0].scale.get(name) if name != "velocity_error" else None
    teacher = f"{number(scale)} (another seed)" if scale is not None else ""
    return [METRICS[name].heading, "", teacher, *(_text(row.fidelity.get(name)) for row in comparisons)]


def _blocks(model: ModelResult) -> tuple[str, int]:
    """Runs that one block stands for, as text, and how many blocks have smaller modules."""
    blocks = [block for stack in model.blocks.values() for block in stack]
    runs = [f"{block.first}-{block.last}" for block in blocks if block.last > block.first]
    return ", ".join(runs) or "none", sum(bool(block.width) for block in blocks)


def side_by_side(run: Path, columns: int = 6, side: int = 100, gap: int = 6) -> Image.Image:
    """Teacher above student: some prompts, each from two noises that both share.

    Args:
        run: With pictures of both.
        columns: Prompts, evenly spaced among those that the student drew twice.
        side: Pixels of a picture here.
        gap: Pixels between pictures.
    """
    pictures = run / "eval"
    noises = {"teacher": ("seed-0", "seed-1"), "student": ("seed-0", "again-1")}
    twice = sorted((pictures / "student" / "again-1").glob("*.png"))
    names = [path.name for path in twice[:: max(1, len(twice) // columns)][:columns]]
    prompts = read_json(pictures / "student" / "seed-0" / "prompts.json")["prompts"]
    left, font = 84, ImageFont.load_default(15)
    page = Image.new("RGB", (left + len(names) * (2 * (side + gap) + gap), 2 * (side + gap) + 32), "white")
    pen = ImageDraw.Draw(page)
    for row, (label, folders) in enumerate(noises.items()):
        pen.text((gap, row * (side + gap) + side // 2 - 8), label, fill="#374151", font=font)
        for column, name in enumerate(names):
            start = left + column * (2 * (side + gap) + gap)
            for place, folder in enumerate(folders):
                drawn = open_picture(pictures / label / folder / name).resize((side, side), Image.Resampling.LANCZOS)
                page.paste(drawn, (start + place * (side + gap), row * (side + gap)))
            middle = start + side + gap // 2
            where = (middle, 2 * (side + gap) + 4)
            pen.text(where, prompts[int(Path(name).stem)], fill="#374151", font=font, anchor="ma")
    return page


def main() -> None:
    """The command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="gets a folder a run")
    parser.add_argument("--table", type=Path, help="also write the page here, e.g. docs/results.md")
    parser.add_argument("--picture", type=Path, help="also write pictures of the first run here")
    given = parser.parse_args()
    folders = [finished(name, given.out) for name in RUNS]
    evaluations = [load_evaluation(folder / "eval" / "metrics.json") for folder in folders]
    plans = [load_artifact(CompressionPlan, folder / "plan.json") for folder in folders]
    of_blocks = {" ".join(RUNS[name]): _blocks(one.models[1]) for name, one in zip(RUNS, evaluations, strict=True)}
    smaller = "; ".join(f"{count} of `{name}`" for name, (_, count) in of_blocks.items())
    teacher = evaluations[0].models[0]
    text = (
        "# Results on the embedded teacher\n\n"
        "Three runs on the embedded teacher with its default settings; the first is what `make demo` does. "
        f"{evaluations[0].prompts} prompts: pairs of emoji and ground that neither teacher nor student has seen; "
        "features of the embedded evaluator.\n\n"
        f"{table(evaluations, plans, [seconds_of(folder) for folder in folders])}\n"
        + AFTERWORD.format(
            reference=f"{evaluations[0].reference} ({evaluations[0].reference_count})",
            seeds=max((len(entry.values) for entry in teacher.spread.values()), default=1),
            blocks="; ".join(f"`{name}`: {runs}" for name, (runs, _) in of_blocks.items()),
            smaller=f"Blocks with smaller modules: {smaller}.",
        )
        + "\n"
        + provenance(f"python benchmarks/results.py {shlex.join(sys.argv[1:])}".rstrip(), "cpu")
        + "\n"
    )
    print(text)
    if given.table:
        write_text(given.table, text)
    if given.picture:
        with atomic_path(given.picture) as temporary:
            side_by_side(folders[0]).save(temporary, format="PNG")


if __name__ == "__main__":
    main()
