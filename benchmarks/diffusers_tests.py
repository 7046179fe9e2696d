"""Do diffusers' own tests of its models and pipelines pass on compressed classes as they do on stock ones?

    python benchmarks/diffusers_tests.py --tests CHECKOUT/tests --table docs/diffusers_tests.md

CHECKOUT is a checkout of diffusers near the installed version. Its fast tests of our families run twice on the CPU,
each time by a pytest that has this file as a plugin: as they stand, and with the compressed class in the place of the
stock one. In the first block of every list its networks have half of their neurons, its attentions half of their heads,
its modulation layers rank 2, whichever of these the family has; units are found as the fit stage finds them, from one
call that the test itself makes. Fewer blocks alone are a stock class with another number in its config.

Tokenizers and configs that the tests take from the hub are replaced by tiny ones, in both runs. What compiles, needs a
GPU, another package or the hub is not run. Some of their files need the package parameterized.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "integration")]
FAMILIES = {
    "Qwen-Image": ["transformer_qwenimage", "qwenimage/test_qwenimage.py"],
    "FLUX.1": ["transformer_flux", "flux/test_pipeline_flux.py", "flux/test_pipeline_flux_kontext.py"],
    "FLUX.2": ["transformer_flux2", "flux2/test_pipeline_flux2_klein.py"],
    "SD3": ["transformer_sd3", "stable_diffusion_3/test_pipeline_stable_diffusion_3.py"],
    "Z-Image": ["transformer_z_image", "z_image/test_z_image.py"],
    "Wan": ["transformer_wan", "wan/test_wan.py", "wan/test_wan_22.py"],
    "HunyuanVideo": ["transformer_hunyuan_video", "hunyuan_video/test_hunyuan_video.py"],
    "LTX": ["transformer_ltx", "ltx/test_ltx.py"],
    "PixArt": ["pixart_transformer2d", "pixart_sigma/test_pixart.py"],
    "Sana": ["transformer_sana", "sana/test_sana.py"],
    "Lumina2": ["transformer_lumina2", "lumina2/test_pipeline_lumina2.py"],
    "AuraFlow": ["transformer_aura_flow"],
    "Bria": ["transformer_bria"],
    "CogVideoX": ["transformer_cogvideox"],
    "CogView4": ["transformer_cogview4"],
    "HunyuanVideo 1.5": ["transformer_hunyuan_1_5"],
    "JoyImage": ["transformer_joyimage"],
    "Krea 2": ["transformer_krea2"],
    "LongCat-Image": ["transformer_longcat_image"],
    "Mochi": ["transformer_mochi"],
    "Ovis-Image": ["transformer_ovis_image"],
    "PRX": ["transformer_prx"],
    "SkyReels-V2": ["transformer_skyreels_v2"],
}
NOT_HERE = ["slow", "nightly", "compile", "single_file", "quantization", "context_parallel", "tensor_parallel"]
# What a compressed class cannot pass: expression that finds a test's name -> why.
LEFT_OUT = {
    "test_gradient_checkpointing_is_applied$": "it expects the stock class's name",
    "::test_inference$": "numbers of the stock class's weights are written into it",
    "IPAdapter": "refused on purpose: ppcl.pipelines.load_ip_adapter cuts one made for the teacher",
}
LATE = "out of time"


# --- the plugin ---


class Found(Exception):
    """The arguments of a transformer's first call."""


def smaller(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What to make smaller in the first block of each list, as the config entry ``pruning`` has it."""
    from ppcl.modules.parts import join
    from ppcl.modules.slicing import joined
    from ppcl.pruning.unit_search import find_sites
    from ppcl.teacher.blocks import ResidentBlocks
    from ppcl.teacher.families import adapter_for
    from ppcl.teacher.trace import record_boundaries

    adapter = adapter_for(model)
    stacks = [spec for spec in adapter.stacks if len(adapter.blocks(model, spec))]
    calls, _ = record_boundaries(model, adapter, arguments, {(spec.name, 0) for spec in stacks})
    pruning = {}
    for spec in stacks:
        layers = spec.of(adapter.blocks(model, spec)[0]).modulation.values()
        pruning |= {join(spec.name, "0", path): {"kind": "low_rank", "size": 2} for path in layers}
    for site in find_sites(ResidentBlocks(model), calls, ("ffn", "attention")):
        if site.place[1] == 0:
            units = [one.units for one in site.sites]
            pruning[join(site.place[0], "0", site.path)] = joined([u.part(range(0, u.count, 2)) for u in units])
    assert pruning, f"nothing of {type(model).__name__} is smaller"
    return pruning


class Pruned:
    """Finds what to make smaller once for each class and config."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, Any]] = {}

    def __call__(self, kind: Any, config: dict[str, Any], call: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """For a class and its config; ``call`` gives the arguments of a call of a model of it."""
        import torch

        key = f"{kind.__name__} {sorted(config.items())}"
        if key not in self.known:
            state = torch.get_rng_state()
            model = kind.from_config(config).eval().requires_grad_(False)
            with torch.no_grad():
                self.known[key] = smaller(model, call(model))
            torch.set_rng_state(state)
        return self.known[key]


def supported(kind: Any) -> bool:
    """Whether there is a compressed class of it."""
    from ppcl.teacher.families import ADAPTERS

    return getattr(kind, "__name__", "") in ADAPTERS


def replace_model(tests: Any, pruned: Pruned) -> None:
    """Have a class of tests of a model work on the compressed class."""
    from ppcl.modules.compressed import compressed_class

    kind, config = tests().model_class, tests.get_init_dict

    def get_init_dict(self: Any) -> dict[str, Any]:
        own = config(self)
        return {**own, "pruning": pruned(kind, own, lambda model: self.get_dummy_inputs())}

    tests.model_class, tests.get_init_dict = compressed_class(kind), get_init_dict


def first_call(tests: Any, parts: dict[str, Any], name: str, model: Any) -> dict[str, Any]:
    """What a pipeline calls one of its transformers with."""
    import inspect

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        raise Found(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    model.register_forward_pre_hook(stop, with_kwargs=True)
    pipeline = tests.pipeline_class(**{**parts, name: model})
    pipeline.set_progress_bar_config(disable=True)
    inputs = tests.get_dummy_inputs(
        *(["cpu"] if "device" in inspect.signature(tests.get_dummy_inputs).parameters else [])
    )
    try:
        pipeline(**inputs)
    except Found as found:
        arguments: dict[str, Any] = found.args[0]
        model._forward_pre_hooks.clear()
        return {key: value for key, value in arguments.items() if key != "return_dict"}
    raise AssertionError(f"{name} is not called")


def replace_component(tests: Any, pruned: Pruned) -> None:
    """Have a class of tests of a pipeline work on compressed transformers."""
    from ppcl.modules.compressed import compressed_class

    components = tests.get_dummy_components

    def get_dummy_components(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        import torch

        parts: dict[str, Any] = components(self, *args, **kwargs)
        for name in ("transformer", "transformer_2"):
            if supported(type(parts.get(name))):
                kind, config = type(parts[name]), dict(parts[name].config)
                pruning = pruned(kind, config, partial(first_call, self, parts, name))
                torch.manual_seed(0)
                parts[name] = compressed_class(kind).from_config({**config, "pruning": pruning})
        return parts

    tests.get_dummy_components = get_dummy_components


def stand_ins() -> None:
    """Tiny tokenizers and configs where tests ask the hub for some."""
    import tiny_pipelines as tiny
    import transformers
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    from ppcl.emoji.components import new_tokenizer

    def clip() -> Any:
        tokenizer = tiny.clip_tokenizer()
        tokenizer.model_max_length = 77
        return tokenizer

    def words() -> Any:
        tokenizer = new_tokenizer(["a dog is dancing"])
        tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        return tokenizer

    t5 = partial(transformers.T5Config, vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    configs = {"hf-internal-testing/tiny-random-t5": t5}
    tokenizers = {
        "hf-internal-testing/tiny-random-t5": tiny.t5_tokenizer,
        "hf-internal-testing/tiny-random-clip": clip,
        "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": words,
        "hf-internal-testing/dummy-gemma": tiny.t5_tokenizer,
        "finetrainers/dummy-hunyaunvideo": tiny.t5_tokenizer,
    }
    models = {name: lambda config=config: transformers.T5EncoderModel(config()) for name, config in configs.items()}
    for owner, made in (
        (transformers.PreTrainedTokenizerBase, tokenizers), (AutoTokenizer, tokenizers),
        (transformers.AutoConfig, configs), (transformers.T5EncoderModel, models),
    ):  # fmt: skip
        owner.from_pretrained = _made_or_loaded(owner.from_pretrained.__func__, made)


def _made_or_loaded(load: Any, made: dict[str, Any]) -> Any:
    def from_pretrained(kind: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        return made[name]() if name in made else load(kind, name, *args, **kwargs)

    return classmethod(from_pretrained)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Put the compressed classes in, if they are to be tested."""
    import ppcl.pipelines  # noqa: F401 - makes the compressed classes known

    stand_ins()
    if os.environ["PPCL_TESTED"] != "compressed":
        return
    pruned = Pruned()
    for tests in dict.fromkeys(item.cls for item in items if item.cls):
        if hasattr(tests, "get_init_dict") and supported(tests().model_class):
            replace_model(tests, pruned)
        elif hasattr(tests, "get_dummy_components"):
            replace_component(tests, pruned)


SPENT: dict[str, float] = {}


def pytest_runtest_protocol(item: Any) -> None:
    """Note when a test begins."""
    item.began = time.process_time()


def pytest_runtest_setup(item: Any) -> None:
    """Skip what comes after a file has had its time."""
    import pytest

    if SPENT.get(item.path.name, 0) > float(os.environ["PPCL_SECONDS"]):
        pytest.skip(LATE)


def pytest_runtest_teardown(item: Any) -> None:
    """Count the time of a file."""
    SPENT[item.path.name] = SPENT.get(item.path.name, 0) + time.process_time() - item.began


def pytest_runtest_logreport(report: Any) -> None:
    """Append what became of a test."""
    if report.when == "call" or report.outcome != "passed":
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report.longrepr, "reprcrash", "")
        said = getattr(said, "message", str(said))
        with Path(os.environ["PPCL_LOG"]).open("a") as log:
            log.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "said": said[:300]}) + "\n")


# --- the command ---


def paths_of(names: list[str], tests: Path) -> Iterator[Path]:
    """Files of tests that are there."""
    for name in names:
        path = tests / "pipelines" / name if "/" in name else tests / f"models/transformers/test_models_{name}.py"
        if path.is_file():
            yield path


Outcomes = dict[str, tuple[str, str]]  # test -> what became of it, and what was said


def outcomes(kind: str, paths: list[Path], tests: Path, seconds: float, folder: Path) -> Outcomes:
    """Run tests by a pytest of their own, or read what it left in ``folder``."""
    log = folder / f"{kind}.jsonl"
    if not log.exists():
        log.touch()
        home = {"HF_HUB_OFFLINE": "1", "PPCL_TESTED": kind, "PPCL_LOG": str(log), "PPCL_SECONDS": str(seconds)}
        home["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "diffusers_tests", "-p", "no:cacheprovider"]
        command += ["-p", "no:randomly", "-m", " and ".join(f"not {mark}" for mark in NOT_HERE)]
        command += ["--continue-on-collection-errors", "--tb=short", *map(str, paths)]
        environment = {**os.environ, **home}
        done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
    results: Outcomes = {}
    for line in map(json.loads, log.read_text().splitlines()):
        name = line["test"]
        if results.get(name, ("",))[0] != "failed":
            results[name] = (line["outcome"], line["said"].partition("\n")[0])
    return results


def reason(name: str) -> str:
    """Why a test is left out of what a compressed class must pass; empty if it is not."""
    return next((why for part, why in LEFT_OUT.items() if re.search(part, name)), "")


def file_of(test: str) -> str:
    """The name of the file that a test is in."""
    return Path(test.partition("::")[0]).name


def row(family: str, paths: list[Path], stock: Outcomes, compressed: Outcomes) -> tuple[list[str], list[str]]:
    """A line of the table for a family, and what did not pass on the compressed class alone."""
    names = {path.name for path in paths}
    own = {name: outcome for name, (outcome, _) in stock.items() if file_of(name) in names}
    passed = {name for name, outcome in own.items() if outcome == "passed"}
    lost = {name: said for name in sorted(passed) for outcome, said in [compressed[name]] if outcome != "passed"}
    out = [name for name in lost if reason(name)]
    counts = Counter(own.values())
    cells = [counts.total() - counts["skipped"], len(passed), counts["failed"], len(passed) - len(lost), len(out)]
    notes = [f"{family}: `{name.partition('::')[2]}`: {reason(name) or said}" for name, said in lost.items()]
    ran = set(map(file_of, own))  # a file that a test set cannot import has no outcomes
    files = ", ".join(path.stem.removeprefix("test_") for path in paths if path.name in ran)
    return [family, files, *map(str, cells), str(len(lost) - len(out))], notes


def main(argv: list[str] | None = None) -> str:
    """Run them all, print, and write the table."""
    from common import publish

    from ppcl.common.tables import markdown_table

    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--tests", type=Path, required=True, help="the folder tests of a checkout of diffusers")
    given.add_argument("--families", nargs="+", default=[*FAMILIES], choices=[*FAMILIES], help="which (all)")
    given.add_argument("--seconds", type=float, default=300, help="CPU time of a file; what is left is skipped")
    given.add_argument(
        "--logs", type=Path, help="folder that keeps what the tests said; what is there is not run again"
    )
    given.add_argument("--table", type=Path, help="also write the table here")
    args = given.parse_args(argv)
    tests = args.tests.resolve()
    paths = {family: list(paths_of(FAMILIES[family], tests)) for family in args.families}
    with tempfile.TemporaryDirectory() as folder:
        files, logs = [path for own in paths.values() for path in own], args.logs or Path(folder)
        stock, ours = (outcomes(kind, files, tests, args.seconds, logs) for kind in ("stock", "compressed"))
    late = {name for results in (stock, ours) for name, (_, said) in results.items() if LATE in said}
    names = {path.name for path in files}
    late = {name for name in late | (stock.keys() ^ ours.keys()) if file_of(name) in names}
    stock = {name: result for name, result in stock.items() if name in ours and name not in late}
    lines, notes = zip(*(row(family, own, stock, ours) for family, own in paths.items()), strict=True)
    header = ["family", "files of tests", "run", "pass on stock", "fail on stock", "of the former pass on compressed"]
    said = "".join(f"\n* {note}" for own in notes for note in own)
    reasons = Counter(said[:100] for outcome, said in stock.values() if outcome == "failed")
    stocks = "".join(f"\n* {count} times: {text}" for text, count in reasons.most_common())
    skipped = f" {len(late)} tests are left out because one of the two runs had no time for them." if late else ""
    text = (
        "# diffusers' own tests on compressed classes\n\n"
        f"{markdown_table([*header, 'left out', 'fail'], list(lines))}\n\n{_WORDS}{skipped}"
        f" What passes on stock and not on compressed:\n{said or ' nothing.'}"
    )
    text += f"\n\nWhat fails on stock here:\n{stocks}" if stocks else ""
    return publish(args, argv, "diffusers_tests.py", text, "cpu")


_WORDS = (
    "Fast tests of diffusers' repository on the CPU, on the stock class and on the compressed one: in the first block "
    "of each list half of the neurons, half of the heads, modulation of rank 2. Tokenizers and configs that tests take "
    "from the hub are tiny ones made here, so numbers that are written into tests may fail on stock, too, and so does "
    f"what needs other files of the hub. Not run: {', '.join(NOT_HERE)}, and what needs a GPU. Fewer blocks alone are "
    "the stock class with another number in its config."
)

if __name__ == "__main__":
    main()
