"""The bounds of hostile inputs' tests: each is felt while the block runs, and none by what ran before it."""

import time

import pytest
from bounds import bounded


def test_work_waiting_and_memory_are_bounded():
    large = bytearray(300_000_000)  # an earlier peak, which counts for nobody
    del large
    with bounded(5, 1e8):
        bytearray(1_000_000)
    with pytest.raises(AssertionError, match="more"), bounded(5, 1e8):
        bytearray(200_000_000)
    with pytest.raises(AssertionError, match="SIGPROF"), bounded(0.2):
        while True:
            pass
    with pytest.raises(AssertionError, match="SIGALRM"), bounded(0.1):
        time.sleep(60)
    time.sleep(1.5)  # nothing comes after the block
