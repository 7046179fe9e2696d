"""The code file of a compressed pipeline for people who do not have ppcl.

It is made out of :mod:`ppcl.modules.replacements`, what that needs, and
:func:`ppcl.modules.compressed.compressed_class` themselves, so that what it builds is what ppcl builds. diffusers runs
it only with ``trust_remote_code=True``.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from ppcl import __version__
from ppcl.common.files import read_json, write_json, write_text
from ppcl.config.names import PREFIX, TRANSFORMER
from ppcl.modules import parts, slicing, text_stream
from ppcl.modules import replacements as width
from ppcl.modules.compressed import MODULE, compressed_class

PARTS = (parts, slicing, text_stream, width)  # each needs those before it alone
_HEADER = '''"""{name}: {base} with smaller modules inside its blocks, by ppcl {version}.

Written by ppcl for loading without it; nothing here reads or writes a file. What follows is parts.py,
slicing.py, text_stream.py and replacements.py of ppcl/modules, and compressed_class of ppcl/modules/compressed.py.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache

import diffusers
from diffusers.configuration_utils import register_to_config

PREFIX = "{prefix}"


class ModelError(ValueError):
    """A config entry that does not fit the model."""


'''

_FOOTER = """
# One class a process, however often this file is run: pickle asks diffusers for it, and whoever passes a transformer
# to from_pretrained makes diffusers ask for the module.
{name} = getattr(diffusers, "{name}", None) or compressed_class(diffusers.{base})
setattr(diffusers, "{name}", {name})
sys.modules.setdefault("{module}", diffusers)
"""


def source_of(transformer: Any) -> str:
    """The source code that defines a compressed transformer's class, without an import of ppcl.

    Args:
        transformer: A model of a compressed class.
    """
    name = type(transformer).__name__
    base = name.removeprefix(PREFIX)
    inlined = "|".join(["errors", *(re.escape(part.__name__.removeprefix("ppcl.")) for part in PARTS)])
    body = "\n\n".join(inspect.getsource(part).replace("from __future__ import annotations\n", "") for part in PARTS)
    body = re.sub(rf"^from ppcl\.(?:{inlined}) import .*\n", "", body, flags=re.MULTILINE)
    head = _HEADER.format(name=name, base=base, version=__version__, prefix=PREFIX)
    foot = _FOOTER.format(name=name, base=base, module=MODULE)
    text = f"{head}{body}\n\n{inspect.getsource(compressed_class)}\n\n{foot}"
    leftover = re.search(r"^\s*(?:from|import) ppcl.*$", text, flags=re.MULTILINE)
    assert leftover is None, f"the smaller modules need '{leftover[0].strip()}', so that its code does not stand alone"
    return text


def write_code(transformer: Any, folder: Path) -> None:
    """Write the code file of a compressed transformer into its folder."""
    write_text(folder / f"{MODULE}.py", source_of(transformer))


def name_class(pipeline: Path, name: str, remote: bool, component: str = TRANSFORMER) -> None:
    """Let a pipeline's files name the class of its transformer, and where ``AutoModel`` finds its code.

    Args:
        pipeline: The folder; what its files said of another transformer goes.
        name: Of the class.
        remote: Whether its code lies beside the weights.
        component: The transformer's name in the pipeline.
    """
    entry = {"auto_map": {"AutoModel": f"{MODULE}.{name}"}} if remote else {}
    has_others = any(file.parent.name != component for file in pipeline.glob(f"*/{MODULE}.py"))
    index, config = pipeline / "model_index.json", pipeline / component / "config.json"
    of_index = {component: [MODULE if remote else "diffusers", name]}
    for path, more, stays in ((index, of_index, has_others), (config, {}, False)):
        before = read_json(path)  # AutoModel looks into the first of these where it is given a subfolder
        after = {**{key: value for key, value in before.items() if key != "auto_map" or stays}, **entry, **more}
        if after != before:
            write_json(path, after)
