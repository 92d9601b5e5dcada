"""The pace of a sweep: small steps and long rests beside others, all that is asked for where nobody waits."""

from __future__ import annotations

import pytest

from homeagent.maintenance.pace import Pace


def test_nobody_in_the_way_means_whole_batches_and_short_rests() -> None:
    """However slow the disk is, it is nobody's time but the sweep's."""
    pace = Pace(100)
    for _ in range(10):
        assert pace.after_batch(worked=3, held=4, contended=False) == pytest.approx(0.001)
        assert pace.rows == 100


def test_others_get_the_greater_part_of_the_time() -> None:
    """After a batch that kept somebody waiting they have four times as long, and a quarter of a second at most."""
    pace = Pace(100)
    assert pace.after_batch(worked=0.001, held=0.003, contended=True) == pytest.approx(0.012)
    assert pace.after_batch(worked=0.001, held=0.0001, contended=True) == pytest.approx(0.001)
    assert pace.after_batch(worked=0.001, held=60, contended=True) == pytest.approx(0.25)
    assert pace.rest_after(0.01) == pytest.approx(0.04)


def test_a_batch_works_for_a_few_milliseconds_where_others_wait() -> None:
    """Its rows become fewer, step by step and no fewer than ten, and more again when they are found faster."""
    pace = Pace(100)
    rows = []
    for worked_per_row in [0.001] * 5 + [0.00002] * 5:
        pace.after_batch(worked=pace.rows * worked_per_row, held=0.1, contended=True)
        rows.append(pace.rows)
    assert rows == [50, 25, 12, 10, 10, 20, 40, 80, 100, 100]


def test_the_rows_of_a_batch_recover_when_nobody_waits_any_more() -> None:
    """Once the others are gone, the batches are whole again after a few."""
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
def test_a_batch_never_has_more_rows_than_are_asked_for(most: int) -> None:
    """A small batch size is kept as it is, or made smaller, and never none."""
    pace = Pace(most)
    for worked, contended in ((0.0, True), (1.0, True), (0.0, False), (1.0, True), (0.0001, True)):
        pace.after_batch(worked=worked, held=worked, contended=contended)
        assert 1 <= pace.rows <= most
        assert pace.rows >= min(most, 10)
