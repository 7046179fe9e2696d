"""Trees of call arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_models import noise

from ppcl.errors import ModelError
from ppcl.teacher import call_arguments as trees


def same(a: Any, b: Any) -> bool:
    """Equality of trees: types, values and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def call(batch: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of all kinds: per-sample tensors, lists and lists of tensors; shared tensors and values."""
    return {
        "latents": noise(batch, 5, 3, seed=seed),
        "mask": noise(batch, 4, seed=seed) > 0,
        "texts": [noise(2, 3, seed=seed + i) for i in range(batch)],
        "shapes": [[(1, 2, 3)]] * batch,
        "ids": noise(7, 3, seed=50),
        "scale": torch.tensor(2.0),
        "options": {"strength": 0.5, "names": ("a", "b", None), "on": True},
        "nothing": None,
    }


def test_flatten_round_trip_through_json() -> None:
    tree = {
        "nested": [[(1, 2), [noise(2)]], (noise(3, 2).bfloat16(), None, "text"), []],
        "empty": {},
        "tuple": (),
        "values": [True, 1, 2.5, None],
        "mask": torch.tensor([True, False]),
    }
    tensors: dict[str, torch.Tensor] = {}
    node = trees.flatten(tree, "00", tensors)
    assert len(tensors) == 3
    assert all(name.startswith("00.") for name in tensors)
    assert same(trees.unflatten(json.loads(json.dumps(node)), tensors), tree)


def test_an_argument_that_cannot_be_recorded_is_named() -> None:
    with pytest.raises(ModelError, match=r"argument 03\.hook\.1 is a function, which cannot be recorded"):
        trees.flatten({"hook": [1, lambda: None]}, "03", {})


def test_batch_size() -> None:
    assert trees.batch_size(call(3)) == 3
    assert trees.batch_size({"scale": torch.tensor(1.0), "text": None, "images": [noise(2)] * 4}) == 4
    with pytest.raises(ModelError, match="without any tensor"):
        trees.batch_size({"a": None, "b": 3})


def test_take_picks_samples_and_keeps_what_is_shared() -> None:
    whole = call(4)
    part = trees.take(whole, [2, 0], trees.per_sample(whole))
    assert torch.equal(part["latents"], whole["latents"][[2, 0]])
    assert torch.equal(part["texts"][0], whole["texts"][2])
    assert len(part["shapes"]) == 2
    assert same(
        {k: part[k] for k in ("ids", "scale", "options", "nothing")},
        {k: whole[k] for k in ("ids", "scale", "options", "nothing")},
    )


@pytest.mark.parametrize("cuts", [[[0], [1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1, 2, 3]]], ids=str)
def test_join_is_the_inverse_of_take(cuts: list[list[int]]) -> None:
    whole = call(4)
    own = trees.per_sample(whole)
    assert same(trees.join([trees.take(whole, rows, own) for rows in cuts], own), whole)


def test_shared_tensors_are_not_joined_whatever_their_length() -> None:
    """Two samples of each of two calls, and a table of positions that has two rows as well."""
    one, two = call(4) | {"ids": noise(2, 3)}, call(3, seed=9) | {"ids": noise(2, 3)}
    own = trees.per_sample(one)
    joined = trees.join([trees.take(one, [0, 3], own), trees.take(two, [1, 2], own)], own)
    assert torch.equal(joined["ids"], one["ids"])
    assert torch.equal(joined["latents"], torch.cat([one["latents"][[0, 3]], two["latents"][[1, 2]]]))
    assert len(joined["texts"]) == len(joined["shapes"]) == 4


def test_signature_tells_what_may_be_joined() -> None:
    def of(tree: dict[str, Any]) -> str:
        return trees.signature(tree, trees.per_sample(tree))

    base = of(call(4))
    assert of(call(3, seed=9)) == base
    for change in (
        {"latents": noise(4, 6, 3)},
        {"latents": noise(4, 5, 3).double()},
        {"texts": [noise(3, 3)] * 4},
        {"shapes": [[(1, 2, 4)]] * 4},
        {"mask": None},
        {"ids": noise(8, 3)},
        {"ids": noise(7, 3, seed=51)},
        {"options": {"strength": 0.4}},
    ):
        assert of(call(4) | change) != base, change


def test_positions_are_shared_whatever_their_number() -> None:
    """As many samples as text tokens, axes and rows of the picture; features of texts are no positions."""
    arguments = {
        "hidden_states": noise(3, 6, 8),
        "txt_ids": noise(3, 3),
        "segment_ids": noise(3, 9),
        "visual_rope_pos": [torch.arange(3), torch.arange(3), torch.arange(3)],
        "text_rope_pos": torch.arange(3),
        "axes": [torch.arange(1), torch.arange(4), torch.arange(5)],
        "texts": [noise(2, 8), noise(4, 8), noise(5, 8)],
        "more": {"mask": noise(3, 2), "table": noise(4, 2)},
        "scale": torch.tensor(2.0),
    }
    assert trees.per_sample(arguments) == {"hidden_states", "segment_ids", "texts", "more.mask"}


def test_to_device_keeps_the_structure() -> None:
    moved = trees.to_device(call(2), torch.device("meta"))
    assert moved["texts"][1].is_meta
    assert moved["latents"].is_meta
    assert moved["options"] == call(2)["options"]
    assert moved["shapes"] == [[(1, 2, 3)]] * 2
