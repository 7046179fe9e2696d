"""Strict configs: what is accepted, and what is said about the rest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ppcl.config import RunConfig, for_model, load_config, merge, parse_override, parse_seeds, parse_size
from ppcl.config.memory import changed, for_tables
from ppcl.errors import ConfigError, UserError


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("distill: {local_step: 3}", "distill.local_step", "local_steps"),
        ("distil: {local_steps: 3}", "distil", "distill"),
        ("plan: {kep: 0.5}", "plan.kep", "keep"),
        ("sed: 1", "sed", "seed"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, text: str, key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([write(tmp_path, text)], [])
    assert str(caught.value).startswith(f"unknown key '{key}' (did you mean '{meant}'?); valid: ")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_an_unknown_override_is_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'fit\.stepps' \(did you mean 'steps'\?\)"):
        load_config([], ["fit.stepps=3"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("fit.width=attention", "fit.width = 'attention': expected a list, e.g. [a,b]"),
        ("fit.width=[ffn,atention]", "fit.width = 'atention': expected .* (did you mean 'attention'?)"),
        ("distill.offload=dsk", "distill.offload = 'dsk': expected 'none', 'cpu' or 'disk' (did you mean 'disk'?)"),
        ("plan.keep=60", "plan.keep = 60: expected less than or equal to 1"),
    ],
)
def test_a_wrong_value_says_what_is_expected(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert re.fullmatch(re.escape(said).replace(r"\.\*", ".*"), str(caught.value))


def test_two_budgets_are_refused() -> None:
    with pytest.raises(ConfigError, match="keep and speedup are both set; give one budget"):
        load_config([], ["plan.keep=0.5", "plan.speedup=2"])


@pytest.mark.parametrize(
    ("overrides", "budget"),
    [
        ([], ("keep", 0.6)),
        (["plan.keep=0.5"], ("keep", 0.5)),
        (["plan.speedup=1.7"], ("speedup", 1.7)),
        (["plan.fit_gb=24"], ("fit_gb", 24.0)),
    ],
)
def test_budget_in_force(overrides: list[str], budget: tuple[str, float]) -> None:
    assert load_config([], overrides).plan.budget == budget


def test_yaml_reads_exponents_as_numbers(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-4 for text."""
    path = write(tmp_path, "distill: {local_learning_rate: 1e-4}\nanalyze: {ridges: [1e-6, 1e-3]}")
    config = load_config([path], ["distill.output_learning_rate=2e-5", "fit.steps=1e2"])
    assert config.distill.local_learning_rate == 1e-4
    assert config.distill.output_learning_rate == 2e-5
    assert config.analyze.ridges == (1e-6, 1e-3)
    assert config.fit.steps == 100


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("a.b=c", ["a", "b"], "c"),
        ("plan.keep=0.5", ["plan", "keep"], 0.5),
        ("plan.keep=", ["plan", "keep"], None),
        (" seed = 3", ["seed"], 3),
        ("fit.starts=[first, mean]", ["fit", "starts"], ["first", "mean"]),
        ("capture.negative_prompt=a=b", ["capture", "negative_prompt"], "a=b"),
        ("x=true", ["x"], True),
        ("x=1e-4", ["x"], 1e-4),
    ],
)
def test_overrides(text: str, keys: list[str], value: object) -> None:
    assert parse_override(text) == (keys, value)


@pytest.mark.parametrize("text", ["plan.keep", "=3", " =3", "a=[1"])
def test_bad_overrides(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_override(text)


def test_later_values_win(tmp_path: Path) -> None:
    base = write(tmp_path, "seed: 1\nfit: {steps: 5, max_run: 4}\ncapture: {height: 64}")
    more = write(tmp_path, "fit: {steps: 6}\nseed: 2", "b.yaml")
    config = load_config([base, more], ["fit.steps=7"], {"capture": {"width": 32}, "fit": {"batch_size": 3}})
    assert (config.seed, config.fit.steps, config.fit.max_run, config.fit.batch_size) == (2, 7, 4, 3)
    assert (config.capture.height, config.capture.width) == (64, 32)
    assert config.evaluate == RunConfig().evaluate


def test_merge_does_not_touch_its_arguments() -> None:
    base, changes = {"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": {"z": 0}}
    assert merge(base, changes) == {"a": {"x": 1, "y": 3}, "b": 1, "c": {"z": 0}}
    assert base == {"a": {"x": 1, "y": 2}, "b": 1}
    assert merge({"a": {"x": 1}}, {"a": None}) == {"a": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fit: {steps: many}", r"fit\.steps = 'many'"),
        ("plan: {keep: 1.5}", r"plan\.keep = 1\.5: .*less than or equal to 1"),
        ("plan: {mode: best}", r"plan\.mode = 'best': unknown search; valid: optimal"),
        ("fit: 3", r"fit = 3"),
        ("- a", "must hold a mapping of sections, got list"),
        ("a: [1", "cannot be read as YAML"),
        ("1: 2", "1"),
    ],
)
def test_bad_values_are_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([write(tmp_path, text)], [])
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_config([tmp_path / "none.yaml"], [])


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config([write(tmp_path, "# nothing yet\n")], []) == RunConfig()


def test_configs_are_frozen_and_survive_a_dump() -> None:
    config = load_config([], ["plan.keep=0.5", "fit.starts=[mean]"])
    with pytest.raises(ValidationError):
        config.fit.steps = 3
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.release_gradients=true", "sparsity.share=0.5"], "leave out distill.release_gradients"),
        (["distill.one_at_a_time=true", "sparsity.share=0.5"], "leave out distill.one_at_a_time"),
        (["distill.release_gradients=true", "distill.spike_factor=3"], "leave distill.spike_factor out"),
        (["distill.shard_teacher=true", "distill.offload=cpu"], "distill.offload=cpu does not let"),
        (["distill.shard_teacher=true", "distill.one_at_a_time=true"], "distill.one_at_a_time does not let"),
        (["distill.shard_teacher=true", "distill.train=lora"], "distill.train=lora writes to"),
        (["distill.one_at_a_time=true", "distill.fresh=8", "capture.data=x"], "distill.fresh has none of"),
    ],
)
def test_ways_to_train_that_do_not_go_together(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config([], overrides)


def test_how_often_is_saved_is_not_what_is_trained() -> None:
    plain = load_config([], [])
    assert load_config([], ["distill.checkpoint_every=3"]).distill.identity() == plain.distill.identity()
    assert load_config([], ["distill.batch_size=3"]).distill.identity() != plain.distill.identity()


def test_changed_settings_are_checked() -> None:
    settings = load_config([], ["distill.one_at_a_time=true"]).distill
    with pytest.raises(ConfigError, match=r"^distill\.one_at_a_time trains each run by itself"):
        changed(settings, sequence="sequential")
    assert changed(settings, one_at_a_time=False, sequence="sequential").sequence == "sequential"


def test_tables_say_what_they_leave_out(caplog: pytest.LogCaptureFixture) -> None:
    plain = load_config([], ["seed=3"])
    assert for_tables(plain) is plain
    asked = ["distill.offload=cpu", "distill.one_at_a_time=true", "distill.sample_every=5"]
    asked += ["plan.recover=3", "plan.rounds=2", "export.quantize=nvfp4"]
    assert for_tables(load_config([], ["seed=3", *asked])) == plain
    assert len(caplog.messages) == 1
    for name in (text.partition("=")[0] for text in asked):
        assert name in caplog.messages[0]


def test_a_file_of_ones_own_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_bytes(b"# caf\xe9\n")
    settings = load_config([], [f"fit.criterion={tmp_path / 'own.py'}:Own"]).fit
    with pytest.raises(ConfigError, match=r"own\.py cannot be read as UTF-8 text: "):
        settings.identity()


def test_one_place_for_a_models_defaults(tmp_path: Path) -> None:
    """The command line, the Python calls and an open run agree; what the user sets stays."""
    from ppcl.cli.options import Budget, Settings, resolve
    from ppcl.run import Run

    own = resolve("emoji", Settings(overrides=["plan.keep=0.3"]), Budget())
    assert (own.capture.height, own.capture.guidance_scale, own.plan.keep) == (48, 3.0, 0.3)
    run = Run("emoji", tmp_path / "run", load_config([], ["plan.keep=0.3"]))
    assert run.config == own == for_model("emoji", run.config)
    assert for_model("emoji", load_config([], ["capture.height=64"])).capture.height == 64
    plan = for_model("emoji", load_config([], ["plan.speedup=1.5"])).plan
    assert plan.budget == ("speedup", 1.5)
    assert for_model("some/model", RunConfig()) == RunConfig()


def test_compress_in_python_uses_the_models_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ppcl
    from ppcl.cli.options import Budget, Settings, resolve
    from ppcl.run import Run

    seen = []
    monkeypatch.setattr(Run, "run", lambda run, stage: seen.append(run.config))
    ppcl.compress("emoji", tmp_path / "run")
    assert seen[0] == resolve("emoji", Settings(), Budget())
    assert seen[0].capture.height == 48


@pytest.mark.parametrize(("section", "key"), [("fit", "criterion"), ("plan", "mode")])
def test_what_changed_is_said_of_a_file_of_the_users(tmp_path: Path, section: str, key: str) -> None:
    from ppcl.run.record import changed_settings

    (tmp_path / "own.py").write_text("class Own: ...\n")
    name = f"{tmp_path / 'own.py'}:Own"
    before = RunConfig().model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"config": before}))
    now = load_config([], [f"{section}.{key}={name}"])
    said = changed_settings(tmp_path / "config.yaml", now, section)
    assert said == [f"{section}.{key} {before[section][key]} -> {name}"]


@pytest.mark.parametrize(
    "override",
    [
        "capture.height=-16",
        "capture.height=0",
        "capture.width=1000000",
        "capture.num_inference_steps=1e9",
        "distill.local_steps=1e9",
        "distill.output_steps=100000000000",
        "fit.steps=1e9",
        "evaluate.speed_batch_sizes=[1000000000]",
        "evaluate.speed_steps=[1, 1e9]",
        "distill.lora_rank=1e9",
        "distill.sparsity.states=1e12",
        "plan.search_steps=1e9",
        "distill.accumulate=1e9",
        "threads=1e9",
        "seed=1e23",
        "seed=99999999999999999999999",
        "seed=-1",
        "seed=" + "1" * 5000,
        "analyze.ridges=[]",
        "analyze.ridges=[-1]",
        "analyze.ridges=[.nan]",
        "fit.starts=[]",
        "fit.modulation_tolerances=[2]",
        "fit.width_ridge=.inf",
        "distill.local_learning_rate=.nan",
        "distill.weight_decay=.inf",
        "capture.aspect_ratios=[]",
        "capture.aspect_ratios=['1:100000000']",
        "plan={keep: 0.5, keep: 0.6}",
        "plan.keep=&a 0.5",
        "distill.sparsity=3",
        "plan=[]",
        "fit=3",
    ],
    ids=lambda text: text[:40],
)
def test_values_that_would_fail_late_are_refused_at_once(override: str) -> None:
    if override == "plan.keep=&a 0.5":  # an anchor that nothing refers to is a value
        assert load_config([], [override]).plan.keep == 0.5
        return
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("size", ["", " ", "0", "-24GB", "nan", "infGB", "1e400", "GB", "b"])
def test_a_size_is_a_number_above_nothing(size: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(size)


def test_a_seed_of_many_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not a list of different seeds"):
        parse_seeds("1" * 5000)
