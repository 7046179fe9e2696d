"""Reading ``metrics.json`` of version 1: that of a run had a schema of its own, with a teacher and a student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppcl.eval.metrics import CAPTION_SCORES, COSTS, SCORES
from ppcl.eval.results import SCHEMA_VERSION

_TIMES = ("latency_p10_ms", "latency_p90_ms")


def upgraded(data: Any) -> Any:
    """The content of a ``metrics.json`` as the present version holds it; what is of no known version as it is."""
    if not isinstance(data, dict) or data.get("schema_version") != 1:
        return data
    if "models" in data:
        return {**data, "schema_version": SCHEMA_VERSION}
    return _of_run(data)


def _number(value: float | None, limits: Any, over: str = "pictures") -> dict[str, Any] | None:
    if value is None:
        return None
    low, high = limits if isinstance(limits, list) and len(limits) == 2 else (None, None)
    return {"value": value, "low": low, "high": high, "over": over}


def _present(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if entry is not None}


def _model(data: Mapping[str, Any], side: str) -> dict[str, Any]:
    held, limits = data[side], data.get("intervals", {}).get(side, {})
    spreads = data.get("teacher_spread", {}) if side == "teacher" else {}
    return {
        "label": side,
        "model": side,
        "params": held["params"],
        "numbers": _present({name: _number(held.get(name), limits.get(name)) for name in SCORES}),
        "spread": {name: entry for name, entry in spreads.items() if entry.get("values")},
        "costs": {name: held.get(name) for name in (*COSTS, *_TIMES) if name != "params"},
        "speed": (data.get("speed") or {}).get(side, []),
        "zeros": (data.get("sparsity") or {}) if side == "student" else {},
    }


def _of_run(data: Mapping[str, Any]) -> dict[str, Any]:
    limits, fidelity = data.get("intervals", {}), dict(data["fidelity"])
    steps = fidelity.pop("velocity_error_by_timestep", [])
    scale = {"psnr": fidelity.pop("teacher_psnr_other_seed", None)}
    scale["velocity_error"] = fidelity.pop("velocity_error_undistilled", None)
    of_pairs = limits.get("fidelity", {})
    drops, drop_limits = data.get("average_drop_per_metric", {}), limits.get("average_drop_per_metric", {})
    references = {"real": "real pictures", "teacher": "the teacher's second seed"}
    comparison = {
        "label": "student",
        "against": "teacher",
        "average_drop": _number(data.get("average_drop"), limits.get("average_drop")),
        "average_drop_per_score": _present(
            {name: _number(drops.get(name), drop_limits.get(name)) for name in CAPTION_SCORES}
        ),
        "differences": {},
        "fid_ratio": _number(data.get("fid_ratio"), limits.get("fid_ratio")),
        "fidelity": _present(
            {
                name: _number(value, of_pairs.get(name), "states" if name == "velocity_error" else "pictures")
                for name, value in fidelity.items()
            }
        ),
        "scale": _present(scale),
        "velocity_error_by_timestep": steps,
        "param_ratio": data.get("param_ratio") or data["student"]["params"] / data["teacher"]["params"],
        "speedup": data.get("speedup"),
        "speedup_end_to_end": data.get("speedup_end_to_end"),
        "verdict": "",
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "features": data["features"],
        "prompts": data["samples"]["prompts"],
        "seed": data.get("seed", 0),
        "num_inference_steps": data["num_inference_steps"],
        "reference": references.get(str(data.get("fid_reference"))),
        "reference_count": data["samples"].get("references") or None,
        "memory_measure": data.get("memory_measure", ""),
        "notes": data.get("notes", []),
        "models": [_model(data, "teacher"), _model(data, "student")],
        "comparisons": [comparison],
    }
