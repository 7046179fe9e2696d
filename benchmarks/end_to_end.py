"""Does the one command work on the models that people have? Tiny random ones of each kind, from capture to report.

    python benchmarks/end_to_end.py --table docs/end_to_end.md

Each pipeline (tests/integration/tiny_pipelines.py) is written to a folder; `ppcl compress` makes it smaller in a
process of its own, by depth and by smaller modules of all groups that the family has; diffusers loads what came out and
draws one picture or video. Teachers that start from a picture get it in the ways that there are: pairs of pictures
(`capture.data`), the teacher's own pictures, or those of another pipeline (`capture.sources`). Weights are random and
training takes a few steps: this says that it runs, that parameters are as predicted, and nothing of quality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import publish
from diffusers import DiffusionPipeline
from PIL import Image

import ppcl.pipelines  # noqa: F401 - makes the compressed classes known
from ppcl.common.tables import markdown_table
from ppcl.config import CaptureConfig
from ppcl.config.names import BOTH, TEACHER
from ppcl.modules.parts import FAMILIES, TEXT_KINDS, cuts_of
from ppcl.teacher.families import adapter_for
from ppcl.teacher.pipeline_call import PicturedPrompt, call_pipeline, guidance_arguments

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "integration"))  # where the pipelines are
import tiny_pipelines as tiny

GROUPS = ("modulation", "ffn", "attention", "text")
SMALL = {"height": 32, "width": 32, "num_frames": 5}
PROMPTS = [f"{adjective} {noun}" for adjective in ("red", "blue", "old", "tiny") for noun in ("cat", "house", "boat")]
SETTINGS = (
    "device=cpu", "capture.num_prompts=8", "capture.batch_size=4", "capture.num_inference_steps=2",
    "capture.states_per_prompt=2", "capture.held_out_share=0.25", "analyze.cka_tokens=64", "analyze.batch_size=8",
    f"fit.width=[{','.join(GROUPS)}]", "fit.modulation_tolerances=[0.5,0.1]", "fit.max_run=3", "fit.max_candidates=3",
    "fit.steps=2", "fit.batch_size=4", "fit.eval_states=4", "distill.local_steps=3", "distill.output_steps=2",
    "distill.batch_size=4", "evaluate.num_prompts=2", "evaluate.num_inference_steps=2", "evaluate.batch_size=2",
    "evaluate.velocity_states=4", "evaluate.latency_runs=1", "evaluate.speed_batch_sizes=[1]",
    "evaluate.speed_steps=[1]", "evaluate.teacher_seeds=1", "evaluate.features=emoji",
)  # fmt: skip
DATA, DRAWER = "pairs of pictures", "FLUX.1 draws them"


@dataclass(frozen=True)
class Model:
    """One kind of model that people have.

    Attributes:
        make: Builds the pipeline.
        sources: Where the pictures to start from are, if it wants any.
        component: As ``--component``.
        size: Of pictures and videos, where ``SMALL`` will not do.
    """

    make: Callable[[], Any]
    sources: str = ""
    component: str = ""
    size: Mapping[str, int] | None = None


MODELS = {
    # it brings sources to a megapixel, which a VAE of factor 64 makes 64 tokens
    "Qwen-Image-Edit": Model(
        lambda: tiny.qwen_edit(levels=6, width=2), DATA, size={**SMALL, "height": 128, "width": 128}
    ),
    "FLUX.1 Kontext": Model(tiny.flux_kontext, TEACHER),
    "FLUX.1 Fill": Model(tiny.flux_fill, DATA),
    "FLUX.2": Model(tiny.flux2),
    "SD3.5": Model(tiny.sd3),
    "Z-Image": Model(lambda: tiny.z_image(heads=6)),
    "Wan 2.2, both experts": Model(tiny.wan_two_experts, component=BOTH),
    "Wan image to video": Model(tiny.wan_image_to_video, DRAWER),
    "HunyuanVideo": Model(tiny.hunyuan_video),
}


def groups_cut(transformer: Any) -> set[str]:
    """What of the blocks is smaller, as ``fit.width`` names it."""
    kinds = {cut["kind"] for part in transformer.config.get("pruning", {}).values() for cut in cuts_of(part)}
    names = {"low_rank": "modulation", "linear": "ffn", **FAMILIES, **dict.fromkeys(TEXT_KINDS, "text")}
    return {names[kind] for kind in kinds}


def groups_there(transformer: Any) -> list[str]:
    """The groups of smaller modules that its class has."""
    adapter = adapter_for(transformer)
    missing = set(adapter.without) | (set() if any(spec.text_parts for spec in adapter.stacks) else {"text"})
    return [group for group in GROUPS if group not in missing]


def sources_of(model: Model, folder: Path) -> list[str]:
    """Settings that give a teacher pictures to start from; writes them, or who draws them."""
    if model.sources == DATA:
        (folder / "pairs").mkdir()
        tiny.picture_pairs(folder / "pairs")
        return [f"capture.data={folder / 'pairs'}", "capture.source_column=source"]
    if model.sources == DRAWER:
        tiny.flux().save_pretrained(folder / "drawer")
        return [f"capture.sources={folder / 'drawer'}"]
    return [f"capture.sources={model.sources}"] if model.sources else []


def compress(model: Model, keep: float, folder: Path) -> tuple[int, str]:
    """Write a pipeline to ``folder / "model"`` and compress it; the exit code, and what was said."""
    torch.manual_seed(0)
    model.make().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    sizes = [f"capture.{name}={value}" for name, value in (model.size or SMALL).items()]
    settings = [*SETTINGS, *sizes, *sources_of(model, folder)]
    command = [sys.executable, "-m", "ppcl", "compress", folder / "model", "--out", folder / "run", "--keep", keep]
    command += [] if model.sources == DATA else ["--prompts", folder / "prompts.txt"]
    command += ["--component", model.component] if model.component else []
    command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def draw(pipeline: Any, model: Model) -> None:
    """One picture or video; fails on numbers that are none."""
    pipeline.set_progress_bar_config(disable=True)
    prompt: str = "red cat"
    if model.sources:
        prompt = PicturedPrompt(prompt, "x", lambda: Image.new("RGB", (40, 48), (20, 90, 200)))
    settings = guidance_arguments(pipeline, CaptureConfig(**(model.size or SMALL)))
    output = call_pipeline(pipeline, [prompt], num_inference_steps=2, output_type="pt", **settings)
    drawn = output.frames if hasattr(output, "frames") else output.images
    assert torch.as_tensor(drawn[0]).isfinite().all()


def row(name: str, model: Model, keep: float, folder: Path) -> list[str]:
    """Compress one model and look at what came out; a line of the table."""
    code, said = compress(model, keep, folder)
    if code:
        print(said, file=sys.stderr)
        return [name, "", "", "", f"{keep:g}", "", "", str(code), said.strip().splitlines()[-1]]
    run = folder / "run"
    before, after = (DiffusionPipeline.from_pretrained(path) for path in (folder / "model", run / "pipeline"))
    plans = {"transformer": run / "plan.json"}
    if model.component == BOTH:
        plans = {"transformer": run / "transformer" / "plan.json", "transformer_2": run / "plan.json"}
    parts = [getattr(after, part) for part in plans]
    teachers = [getattr(before, part) for part in plans]
    predicted = [json.loads(path.read_text())["predicted"]["params"] for path in plans.values()]
    counts, whole = ([sum(p.numel() for p in part.parameters()) for part in group] for group in (parts, teachers))
    assert (run / "report.html").is_file()
    result = "loads, draws"
    try:
        draw(after, model)
    except Exception as error:  # a line of the table, and the next model
        result = f"{type(error).__name__}: {error}"
    cut = set.union(*map(groups_cut, parts))
    return [
        name,
        " + ".join(sorted({type(part).__name__ for part in teachers})),
        ", ".join(groups_there(teachers[0])),
        ", ".join(group for group in GROUPS if group in cut) or "none",
        f"{keep:g}",
        f"{sum(counts) / sum(whole):.3f}",
        f"{' + '.join(map(str, counts))}" + ("" if counts == predicted else f", predicted {predicted}"),
        str(code),
        result,
    ]


def main(argv: list[str] | None = None) -> str:
    """Compress them all, print, and write the table."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS], help="which (all)")
    given.add_argument("--keep", type=float, default=0.6, help="share of the parameters")
    given.add_argument("--table", type=Path, help="also write the table here")
    args = given.parse_args(argv)
    lines = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(name, MODELS[name], args.keep, Path(folder)))
        print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    header = [
        "",
        "class",
        "width it has",
        "cut by the plan",
        "keep asked",
        "got",
        "parameters",
        "exit code",
        "result",
    ]
    text = (
        "# From capture to report on the models that people have\n\n"
        f"{markdown_table(header, lines)}\n\n"
        "Tiny random models of the real classes, compressed by depth and by all groups of smaller modules that the "
        "class has; `ppcl compress` in a process of its own, then `DiffusionPipeline.from_pretrained` and one picture "
        "or video. Parameters are those of the loaded transformers; they are as the plan predicted where nothing else "
        "is said. Wherever a picture is wanted, sources are: "
        + "; ".join(f"{name}: {model.sources}" for name, model in MODELS.items() if model.sources)
        + ". Nothing is said of quality: weights are random."
    )
    return publish(args, argv, "end_to_end.py", text, "cpu")


if __name__ == "__main__":
    main()
