"""The export stage: bundle -> an ordinary diffusers pipeline folder with a model card."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppcl.artifacts import CompressionPlan
from ppcl.config import ExportConfig
from ppcl.errors import ArtifactError
from ppcl.files import atomic_path, read_json, write_json, write_text
from ppcl.teacher import absent_parts, model_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(pipeline: Any, student: Any, plan: CompressionPlan, source: str, out: Path, settings: ExportConfig) -> Path:
    """Write the pipeline with the student in the transformer's place; nothing of ours is needed to load it.

    The other components are copied from the source folder byte by byte where it is a folder,
    and saved from memory otherwise.

    Args:
        pipeline: The teacher's pipeline (any dtype).
        student: The compressed transformer with its counts registered.
        plan: For the model card.
        source: What the teacher was loaded from.
        out: The folder to write.
        settings: See :class:`ExportConfig`.

    Returns:
        ``out``.

    Raises:
        ArtifactError: The written transformer does not load back completely.
    """
    if settings.dtype:
        student = student.to(DTYPES[settings.dtype])
    folder = Path(model_path(source))
    with atomic_path(out) as temporary:
        if folder.is_dir():
            ignore = shutil.ignore_patterns("transformer", "README.md", ".*")
            shutil.copytree(folder, temporary, ignore=ignore)
        else:
            temporary.mkdir()
            for name, component in pipeline.components.items():
                if name != "transformer" and hasattr(component, "save_pretrained"):
                    component.save_pretrained(temporary / name)
            pipeline.save_config(temporary)
        student.save_pretrained(temporary / "transformer", max_shard_size=settings.max_shard_size)
        _name_class(temporary / "model_index.json", type(student).__name__)
        write_text(temporary / "README.md", model_card(plan, source, pipeline, absent_parts(temporary)))
        _check(temporary / "transformer", type(student))
    return out


def _name_class(index: Path, name: str) -> None:
    """Let the pipeline's index name the transformer's class; one with smaller modules is not the teacher's."""
    components = read_json(index)
    if components["transformer"][1] != name:
        write_json(index, {**components, "transformer": ["diffusers", name]})


def _check(folder: Path, kind: Any) -> None:
    """Load the transformer as a user would and make sure that no weight is missing."""
    _, info = kind.from_pretrained(folder, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ArtifactError(f"the exported transformer does not match its config ({wrong[0]}); please report this")


def model_card(plan: CompressionPlan, source: str, pipeline: Any, absent: Sequence[str] = ()) -> str:
    """The README of the exported pipeline.

    Args:
        plan: What was done.
        source: What the teacher was loaded from.
        pipeline: The teacher's pipeline.
        absent: Components that plain diffusers must be told are not there, see :func:`ppcl.teacher.absent_parts`.
    """
    task = "text-to-video" if "num_frames" in inspect.signature(pipeline.__call__).parameters else "text-to-image"
    without = "".join(f", {name}=None" for name in absent)
    rows = []
    for name, pieces in plan.stacks.items():
        kept = [str(s.first) if not s.is_run else f"{s.first}-{s.last} -> 1" for s in pieces]
        rows.append(f"* `{name}`: {sum(s.last - s.first for s in pieces)} blocks fewer; kept: {', '.join(kept)}")
    p = plan.predicted
    return f"""---
library_name: diffusers
base_model: {source}
tags: [ppcl, compressed, {task}]
---
# {Path(source).name}, compressed by ppcl

{p.params:,} parameters in the transformer, {p.param_ratio:.1%} of the teacher's. It is a stock
`{type(pipeline).__name__}`: nothing but diffusers is needed.

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("path/to/this/folder"{without})
```

Plan ({plan.mode}, budget {plan.budget}):

{chr(10).join(rows)}

LoRA and ControlNet made for the teacher name its blocks by number; the numbers have moved (the kept blocks are
listed in `transformer/config.json` under `_ppcl`). `ppcl.pipelines.load_lora(pipe, path)` and
`ppcl.pipelines.attach_controlnet(pipe, controlnet)` put them at the right blocks.
"""
