"""Memory that is used again, and never while a tensor in it lives."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import torch

from ppcl.common.pieces import SPARE, Pieces

TENSORS = {"a": torch.arange(5.0), "b": torch.ones(3, 4, dtype=torch.bfloat16), "c": torch.tensor(7)}
KEPT = {name: tensor.dtype for name, tensor in TENSORS.items()}


def address(copies: dict[str, torch.Tensor]) -> int:
    return copies["a"].untyped_storage().data_ptr()


def test_copies_are_equal_aligned_and_in_the_dtypes_asked_for() -> None:
    copies = Pieces().copies(TENSORS, {**KEPT, "b": torch.float32})
    assert copies["b"].dtype == torch.float32
    for name, tensor in TENSORS.items():
        assert torch.equal(copies[name], tensor.to(copies[name].dtype))
        assert copies[name].data_ptr() % 64 == 0
    copies["a"] += 1
    assert TENSORS["a"][0] == 0


def test_a_piece_is_used_again_when_its_last_tensor_is_gone() -> None:
    pieces = Pieces()
    first = pieces.copies(TENSORS, KEPT)
    place, last = address(first), first["b"][1:]  # a view of a tensor holds the piece, too
    del first
    gc.collect()
    second = pieces.copies({name: tensor * 0 for name, tensor in TENSORS.items()}, KEPT)
    assert address(second) != place
    assert bool((last == 1).all())
    del last
    gc.collect()
    assert address(pieces.copies(TENSORS, KEPT)) == place


def test_few_pieces_wait_and_none_of_another_size_is_taken() -> None:
    pieces = Pieces()
    many = [pieces.copies({"a": torch.zeros(5000 * (n + 1))}, {"a": torch.float32}) for n in range(4)]
    del many
    gc.collect()
    assert len(pieces._spare) == SPARE
    larger = pieces.copies({"a": torch.zeros(9000)}, {"a": torch.float32})
    assert larger["a"].untyped_storage().nbytes() >= 36000


def test_threads_never_share_a_piece() -> None:
    pieces, wrong = Pieces(), []

    def use(number: int) -> None:
        for step in range(200):
            copies = pieces.copies({"a": torch.full((3000,), float(number * 1000 + step))}, {"a": torch.float32})
            if not bool((copies["a"] == number * 1000 + step).all()):
                wrong.append((number, step))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    assert wrong == []
