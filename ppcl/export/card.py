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

from ppcl.common.files import read_json
from ppcl.common.tables import device_name, fenced, plain, versions, zeros_meaning
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.block_map import RECORD
from ppcl.teacher.loading import loading_arguments, source_name, stored_dtype, stored_folder

PLACEHOLDER = "path/to/this/folder"  # in the loading line, until the pipeline is pushed
LICENCE_KEYS = ("license", "license_name", "license_link")
REMOTE_LIMITS = (
    "`trust_remote_code=True` runs `transformer/transformer_ppcl.py`, which makes the class known to diffusers and "
    "nothing else; diffusers says that it ignores `auto_map`, which `AutoModel` reads. A copy that `save_pretrained` "
    'writes lacks that file and needs `import ppcl.pipelines`; `device_map="balanced"` does not work with code from a '
    "folder."
)


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
        licence: ``license``, ``license_name`` and ``license_link`` of the source's card.
    """

    source: str
    pipeline_class: str
    dtype: str = ""
    arguments: str = ""
    first: str = ""
    round: int = 1
    making: Making | None = None
    measured: str = ""
    licence: Mapping[str, str] = field(default_factory=dict)


def written_facts(source: str, folder: Path) -> Facts:
    """What a pipeline folder tells by itself, under its final or a temporary name.

    Args:
        source: The teacher.
        folder: The pipeline.
    """
    dtype = stored_dtype(str(folder))
    record = read_json(folder / "transformer" / "config.json").get(RECORD) or {}
    rounds = record.get("rounds") or ()
    return Facts(
        source=source,
        pipeline_class=str(read_json(folder / "model_index.json")["_class_name"]),
        dtype=str(dtype).removeprefix("torch.") if dtype else "",
        arguments=loading_arguments(folder),
        first=str(record.get("source_model", "")) if rounds else "",
        round=1 + len(rounds),
    )


def facts_of(source: str, folder: Path, commands: Sequence[str], seed: int, device: str, measured: str) -> Facts:
    """What is known of a pipeline folder as it stands.

    Args:
        source: The teacher.
        folder: The pipeline, under its final or a temporary name.
        commands: That made it, oldest first; empty and repeated ones are left out.
        seed: Of the run.
        device: On which it was trained and timed.
        measured: The numbers of the evaluate stage, as Markdown; empty before it.
    """
    shown = tuple(dict.fromkeys(shown_command(text) for text in commands if text))
    return replace(
        written_facts(source, folder),
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


def draw_plan(plan: CompressionPlan) -> str:
    """Draw a plan: the first teacher's block numbers in order, in brackets those that became one block."""
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
    body = "\n\n".join(section for section in _sections(plan, facts) if section)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _sections(plan: CompressionPlan, facts: Facts) -> list[str]:
    """The card's paragraphs, in order; empty ones do not apply."""
    p, ((kind, value),) = plan.predicted, plan.budget.items()
    name = plain(source_name(facts.source))
    needs = "nothing but diffusers is needed"
    first = ""
    if plan.own_class:
        needs = (
            "modules inside its blocks are smaller, and importing `ppcl.pipelines` makes its class known to diffusers"
        )
        first = "import ppcl.pipelines\n"
    trusting = "trust_remote_code=True" in facts.arguments
    if trusting:
        needs, first = "modules inside its blocks are smaller, and the code of its class lies in `transformer/`", ""
    stock = "with a transformer of its own class" if plan.own_class else "of stock classes"
    stored = f" Its weights are stored in {facts.dtype}." if facts.dtype else ""
    whose, of_what = "teacher's", f"`{name}`"
    if facts.first:
        base = plain(facts.first)
        whose = f"first teacher's, `{base}`"
        of_what = f"the model that it was made of, which is `{base}` compressed (this is round {facts.round})"
        if plan.share_of_first:
            of_what += f", {plan.share_of_first:.1%} of those of `{base}` itself"
    return [
        f"# {(plain(facts.first) or name).rpartition('/')[2]}, compressed by ppcl",
        f"{p.params:,} parameters in the transformer, {p.param_ratio:.1%} of those of {of_what}. It is a "
        f"`{plain(facts.pipeline_class)}` {stock}: {needs}.{stored}",
        fenced(
            f"{first}from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{PLACEHOLDER}"{facts.arguments})',
            "python",
        ),
        REMOTE_LIMITS if trusting else "",
        "## Blocks",
        f"Block numbers are the {whose}; those in brackets were replaced by one block, distilled against the "
        f"teacher's activations. Plan: {plain(without_folders(plan.mode))}, {kind} {value:.4g}"
        f"{' of the model of the round before' if facts.first else ''}.",
        fenced(draw_plan(plan)),
        *_sparse(plan),
        "## Measured",
        facts.measured or "Nothing yet: `ppcl evaluate` writes the numbers here.",
        *_made(facts.making),
        _licence(facts.licence, name),
        "## LoRA, ControlNet, IP-Adapter",
        "Those made for the teacher name its blocks by number, and the numbers have moved (the kept blocks are listed "
        "in `transformer/config.json` under `_ppcl`). `ppcl.pipelines.load_lora(pipe, path)`, "
        "`attach_controlnet(pipe, controlnet)` and `load_ip_adapter(pipe, path)` put them at the right blocks; "
        "`locate_blocks(pipe, numbers)` translates settings such as SD3.5's `skip_guidance_layers`.",
    ]


def _made(making: Making | None) -> list[str]:
    if making is None:
        return []
    text = f"Seed {making.seed}, {making.device}. Versions: {making.versions}."
    return ["## How it was made", fenced("\n".join(making.commands), "bash"), text]


def _sparse(plan: CompressionPlan) -> list[str]:
    if not plan.sparsity:
        return []
    p = plan.sparsity
    text = (
        f"{p['zeros']:.1%} of all weights are zero: {p['zeros_in_layers']:.1%} of the masked linear layers inside the "
        f"blocks, pattern {p['pattern']}, criterion {plain(without_folders(str(p['criterion'])))}, "
        f"allocation {p['allocation']}. "
    )
    return ["## Sparsity", text + zeros_meaning(str(p["pattern"]))]


def _licence(licence: Mapping[str, str], name: str) -> str:
    """What is known of the source's licence, which a compressed model stays under."""
    if not licence:
        return ""
    text = licence.get("license_name") or licence.get("license", "")
    link = f" ({licence['license_link']})" if "license_link" in licence else ""
    return f"## Licence\n\nThe card of `{name}` states {plain(text + link)}; it holds for this compressed model too."
