"""A server that is restarted under load. PostgreSQL only: for SQLite see the tests of killed processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from homeagent import Database
from tests.conftest import Children
from tests.postgresql.load import Load
from tests.postgresql.server import Server

pytestmark = pytest.mark.usefixtures("postgres_url")

RESTARTS = 10


@pytest.mark.slow
def test_server_restarts_under_load(own_server: Server, children: Children, tmp_path: Path) -> None:
    """After ten restarts, half of them without a shutdown, no caller hangs, and each unit is stored once."""
    with Database.open(own_server.url()) as database:
        load = Load(children, own_server.url(), tmp_path)
        load.start()
        for number in range(RESTARTS):
            load.killing()
            own_server.restart("fast" if number % 2 else "immediate")
            load.wait_for_turns(2)
        report = load.stop()
        load.check(database)
    assert len(report.outages) == RESTARTS
    assert max(last for _, last in report.outages) < 20
