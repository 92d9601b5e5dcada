"""The status of a database: its counters, and the secrets that it omits."""

from __future__ import annotations

from datetime import timedelta

import pytest

from homeagent import AgentCreate, Database, UnitOfWork, errors
from homeagent.maintenance import DatabaseStatus
from tests.conftest import FakeClock


def test_status_has_the_counters(database: Database, clock: FakeClock) -> None:
    """The status has this process's commits, rollbacks, retries, reads and sweeps, and survives a round trip."""
    faults = iter([errors.TransientError("again")])

    def work(unit: UnitOfWork) -> None:
        unit.agents.list()
        if fault := next(faults, None):
            raise fault

    database.run(work)
    with pytest.raises(errors.AgentExistsError), database.unit_of_work() as unit:
        for _ in range(2):
            unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv"))
    with database.unit_of_work() as unit:
        unit.rollback()
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
    assert (counters.commits, counters.rollbacks, counters.retries) == (6, 3, 1)
    assert (counters.sweeps, counters.swept) == (1, 1)
    assert counters.last_error is not None
    assert counters.last_error.kind == "TransientError"
    assert database.counters().reads == before.reads + 1
    assert DatabaseStatus.model_validate_json(status.model_dump_json()) == status
