"""The model card of an exported pipeline: what was removed, what was measured, how it was made."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ppcl.common.files import read_json
from ppcl.common.tables import device_name, versions, zeros_meaning
from ppcl.common.templates import Templates
from ppcl.config.names import TRANSFORMER
from ppcl.student.plan import CompressionPlan
from ppcl.student.words import smaller_modules
from ppcl.teacher.block_map import RECORD
from ppcl.teacher.loading import loading_arguments, source_name, stored_dtype, stored_folder
from ppcl.teacher.stored import has_own_class, transformers_in

PLACEHOLDER = "path/to/this/folder"  # in the loading line, until the pipeline is pushed
LICENCE_KEYS = ("license", "license_name", "license_link")
TEMPLATES = Templates(Path(__file__).resolve().parent / "templates")


@dataclass(frozen=True)
class Making:
    """How a pipeline was made.

    Attributes:
        commands: The command lines, oldest first.
        seed: Of the run.
        versions: Of the packages, on one line.
        device: On which it was trained and timed.
    """

    commands: tuple[str, ...] = ()
    seed: int | None = None
    versions: str = ""
    device: str = ""


@dataclass(frozen=True)
class Facts:
    """What the card tells beside the plan.

    Attributes:
        source: The teacher: a hub id, an embedded model's name, or a folder.
        pipeline_class: Of the exported pipeline.
        dtype: In which the transformer's weights are stored; empty if unknown.
        arguments: What loading needs beside the folder, see :func:`ppcl.teacher.loading.loading_arguments`.
        first: Where the source is a compressed model itself: the first teacher, whose blocks the numbers are of.
        round: Which round of compression it is.
        making: How it was made; None leaves that section out.
        measured: The numbers of the evaluate stage, as Markdown; empty before it.
        component: The transformer that was compressed.
        beside: The pipeline's other transformer, if it has one, and whether that was compressed, too.
        licence: ``license``, ``license_name`` and ``license_link`` of the source's card.
        own_class: Whether the transformer is of a class of ours, with smaller modules.
    """

    source: str
    pipeline_class: str
    dtype: str = ""
    arguments: str = ""
    first: str = ""
    round: int = 1
    making: Making | None = None
    measured: str = ""
    component: str = TRANSFORMER
    beside: tuple[str, bool] | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    own_class: bool = False


def written_facts(source: str, folder: Path, component: str = TRANSFORMER) -> Facts:
    """What a pipeline folder tells by itself, under its final or a temporary name.

    Args:
        source: The teacher.
        folder: The pipeline.
        component: Which transformer of it was compressed.
    """
    dtype = stored_dtype(str(folder), component=component)
    record = read_json(folder / component / "config.json").get(RECORD) or {}
    rounds, kind = record.get("rounds") or (), (record.get("quantised") or {}).get("format")
    other = next((name for name in transformers_in(folder) if name != component), None)
    return Facts(
        source=source,
        pipeline_class=str(read_json(folder / "model_index.json")["_class_name"]),
        dtype=f"{kind}, the rest in bfloat16" if kind else str(dtype).removeprefix("torch.") if dtype else "",
        arguments=loading_arguments(folder),
        first=str(record.get("source_model", "")) if rounds else "",
        round=1 + len(rounds),
        own_class=has_own_class(folder),
        component=component,
        beside=None if other is None else (other, RECORD in read_json(folder / other / "config.json")),
    )


def facts_of(
    source: str,
    folder: Path,
    commands: Sequence[str],
    seed: int,
    device: str,
    measured: str,
    component: str = TRANSFORMER,
) -> Facts:
    """What is known of a pipeline folder as it stands.

    Args:
        source: The teacher.
        folder: The pipeline, under its final or a temporary name.
        commands: That made it, oldest first; empty and repeated ones are left out.
        seed: Of the run.
        device: On which it was trained and timed.
        measured: The numbers of the evaluate stage, as Markdown; empty before it.
        component: Which transformer of it was compressed.
    """
    shown = tuple(dict.fromkeys(shown_command(text) for text in commands if text))
    return replace(
        written_facts(source, folder, component),
        making=Making(shown, seed, versions(), device_name(device)),
        measured=measured,
        licence=source_licence(source),
    )


# where a value begins: at the start of a word, after what joins it to an option or a list, after -c
_BEGIN = r"""(?:^|(?<=[=,:\s\[{("'])|(?<=^-\w))"""
_ROOT = r"(?:file:/+|~[^/\\]*[/\\]|(?:\.{1,2}[/\\])+|[A-Za-z]:[/\\]+|(?<!:)[/\\]+|/(?!/))"
_FOLDERS = re.compile(_BEGIN + _ROOT + r"""(?:[^=,"'\]/\\]*[/\\])*""")


def without_folders(word: str) -> str:
    """A word of a command line with the folders of its paths left out; those below the working folder stay."""
    return _FOLDERS.sub("", word)


def shown_command(command: str) -> str:
    """A command line without the folders of this machine: a card is read by others."""
    try:
        words = shlex.split(command)
    except ValueError:
        return " ".join(map(without_folders, command.split()))
    if len(words) < 2:  # a call from Python
        return without_folders(command)
    return shlex.join(map(without_folders, words))


def source_licence(source: str) -> dict[str, str]:
    """Licence entries of the source model's own card; empty where there is no card or it states none.

    The card of a hub model is fetched if it is not in the cache; without a network it is done without.
    """
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    folder = stored_folder(source)
    try:
        path = folder / "README.md" if folder is not None else None
        if (path is None or not path.is_file()) and source.count("/") == 1 and not Path(source).is_dir():
            path = Path(hf_hub_download(source, "README.md"))
        if path is None:
            return {}
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, EntryNotFoundError, yaml.YAMLError):
        return {}
    return {key: value for key in LICENCE_KEYS if isinstance(value := getattr(data, key, None), str)}


def pipeline_tag(pipeline_class: str, transformer_class: str) -> str:
    """The hub's name for what a pipeline does."""
    if any(word in pipeline_class for word in ("Edit", "Img2Img", "Kontext", "Inpaint", "Fill", "Control", "I2I")):
        return "image-to-image"
    if "3D" in transformer_class:
        return "image-to-video" if re.search("ImageToVideo|I2V", pipeline_class) else "text-to-video"
    return "text-to-image"


def call_text(call: Mapping[str, int | float]) -> str:
    """How a pipeline of few steps is called, as Python; empty of any other."""
    return f"pipe(prompt, {', '.join(f'{name}={value:g}' for name, value in call.items())})" if call else ""


def draw_plan(plan: CompressionPlan) -> str:
    """Draw a plan: the first teacher's block numbers, in brackets those that became one block, and smaller modules."""
    lines = []
    for stack in plan.model.stacks:
        pieces = [stack.first_teachers(s.first, s.last) for s in plan.stacks[stack.name]]
        runs = [f"{first}-{last}" for first, last in pieces if last > first]
        became = f"; became one block each: {', '.join(runs)}" if runs else ""
        of_first = f"{pieces[-1][1] + 1} -> " if stack.spans else ""
        lines.append(f"{stack.name}: {of_first}{stack.num_blocks} -> {len(pieces)} blocks{became}")
        lines += textwrap.wrap(
            " ".join(_drawn(*piece) for piece in pieces),
            width=100,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        )
    smaller = smaller_modules(plan)
    lines += ["smaller modules inside the blocks:", *(f"  {text}" for text in smaller)] if smaller else []
    return "\n".join(lines).replace("~", " ")


def _drawn(first: int, last: int) -> str:
    """One piece of a plan; ``~`` is a space that no line ends at."""
    numbers = "~".join(str(i) for i in range(first, last + 1))
    return f"[{numbers}]" if last > first else numbers


def model_card(plan: CompressionPlan, facts: Facts) -> str:
    """The README of an exported pipeline, with a YAML header that the hub accepts.

    Args:
        plan: What was removed.
        facts: Everything else.

    Returns:
        Markdown.
    """
    from huggingface_hub import ModelCard, ModelCardData

    tag = pipeline_tag(facts.pipeline_class, plan.model.transformer_class)
    licence: dict[str, Any] = dict(facts.licence)
    base = facts.first or facts.source
    on_hub = base.count("/") == 1 and not Path(base).exists()
    data = ModelCardData(
        library_name="diffusers",
        base_model=base if on_hub else None,  # the hub refuses what is not one of its ids
        pipeline_tag=tag,
        tags=["diffusers", "ppcl", "compressed", "depth-pruning", "distillation"],
        **licence,
    )
    trusting = "trust_remote_code=True" in facts.arguments
    imported = "import ppcl.pipelines\n" if facts.own_class and not trusting else ""
    imported += "import torch\n" if "torch." in facts.arguments else ""
    ((kind, value),) = plan.budget.items()
    card = TEMPLATES.markdown(
        "card.md",
        header=Markup(data.to_yaml()),
        plan=plan,
        predicted=plan.predicted,
        facts=facts,
        name=source_name(facts.source),
        trusting=trusting,
        load=f"{imported}from diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{PLACEHOLDER}"{facts.arguments})',
        call=call_text(plan.call),
        mode=without_folders(plan.mode),
        budget=f"{kind} {value:.4g}{' of the model of the round before' if facts.first else ''}",
        drawn=draw_plan(plan),
        criterion=without_folders(str(plan.sparsity["criterion"])) if plan.sparsity else "",
        zeros=zeros_meaning(str(plan.sparsity["pattern"])) if plan.sparsity else "",
        measured=Markup(facts.measured),
        licence=_licence(facts.licence),
    )
    return str(ModelCard(f"{card}\n"))


def _licence(licence: Mapping[str, str]) -> str:
    """What is known of the source's licence, which a compressed model stays under."""
    link = f" ({licence['license_link']})" if "license_link" in licence else ""
    return (licence.get("license_name") or licence.get("license", "")) + link
