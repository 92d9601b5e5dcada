"""The pace of a sweep: small steps and long rests if other units wait, otherwise full batches."""

from __future__ import annotations

import pytest

from homeagent.maintenance.sweep import Pace


def test_full_batches_without_waiters() -> None:
    """If no other unit waits, batches are full and rests are short, however slow the disk is."""
    pace = Pace(100)
    for _ in range(10):
        assert pace.after_batch(worked=3, held=4, contended=False) == pytest.approx(0.001)
        assert pace.rows == 100


def test_waiters_get_the_greater_part_of_the_time() -> None:
    """After a batch that delayed another unit, the rest is four times as long, at most a quarter of a second."""
    pace = Pace(100)
    assert pace.after_batch(worked=0.001, held=0.003, contended=True) == pytest.approx(0.012)
    assert pace.after_batch(worked=0.001, held=0.0001, contended=True) == pytest.approx(0.001)
    assert pace.after_batch(worked=0.001, held=60, contended=True) == pytest.approx(0.25)
    assert pace.rest_after(0.01) == pytest.approx(0.04)


def test_batches_are_short_if_others_wait() -> None:
    """If other units wait, a batch shrinks step by step to at least ten rows, and grows when deletes get faster."""
    pace = Pace(100)
    rows = []
    for worked_per_row in [0.001] * 5 + [0.00002] * 5:
        pace.after_batch(worked=pace.rows * worked_per_row, held=0.1, contended=True)
        rows.append(pace.rows)
    assert rows == [50, 25, 12, 10, 10, 20, 40, 80, 100, 100]


def test_batches_grow_when_no_unit_waits() -> None:
    """When no other unit waits any more, the batches are full again after a few steps."""
    pace = Pace(1_000)
    for _ in range(10):
        pace.after_batch(worked=pace.rows * 0.001, held=0.1, contended=True)
    assert pace.rows == 10
    rows = []
    for _ in range(8):
        pace.after_batch(worked=pace.rows * 0.001, held=0.1, contended=False)
        rows.append(pace.rows)
    assert rows == [20, 40, 80, 160, 320, 640, 1_000, 1_000]


@pytest.mark.parametrize("most", [1, 3, 9, 10, 11])
def test_batch_size_is_never_exceeded(most: int) -> None:
    """A small batch size is kept or reduced, and is never zero."""
    pace = Pace(most)
    for worked, contended in ((0.0, True), (1.0, True), (0.0, False), (1.0, True), (0.0001, True)):
        pace.after_batch(worked=worked, held=worked, contended=contended)
        assert 1 <= pace.rows <= most
        assert pace.rows >= min(most, 10)
