"""The status of a database: its counters, and the secrets that it omits."""

from __future__ import annotations

from datetime import timedelta

import pytest

from homeagent import Database, errors
from homeagent.maintenance import DatabaseCounters, DatabaseStatus
from tests.conftest import FakeClock, add_agent


def test_status_has_the_counters(database: Database, clock: FakeClock) -> None:
    """The status has this process's commits, rollbacks, reads and sweeps, and survives a round trip through JSON."""
    add_agent(database)
    with pytest.raises(errors.AgentExistsError):
        add_agent(database)
    with database.unit_of_work() as unit:
        unit.nonces.consume("lamp", "n", expires_at=clock.now + timedelta(minutes=1))
    clock.advance(hours=2)
    database.sweep()
    before = database.counters()
    status = database.status()
    counters = status.counters
    assert counters.reads == before.reads
    assert counters.units == counters.reads + counters.commits + counters.rollbacks
    # A sweep is four units here: one for each kind of row.
    assert (counters.commits, counters.rollbacks, counters.sweeps, counters.swept) == (6, 1, 1, 1)
    assert counters.last_error is None
    assert database.counters().reads == before.reads + 1
    assert DatabaseStatus.model_validate_json(status.model_dump_json()) == status


def test_last_error_is_in_the_status(database: Database) -> None:
    """The last engine error is in the counters, with its class and its message."""
    with pytest.raises(errors.ReadOnlyError), database.unit_of_work(read_only=True) as unit:
        unit.nonces.delete_expired()
    fault = database.counters().last_error
    assert fault is not None
    assert fault.kind == "ReadOnlyError"
    assert "read" in fault.message


def test_earlier_status_is_read(database: Database) -> None:
    """A status that an earlier version stored without counters can still be read."""
    old = database.status().model_dump(mode="json")
    del old["counters"]
    assert DatabaseStatus.model_validate(old).counters == DatabaseCounters()
