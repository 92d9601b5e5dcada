"""A server that is restarted under load. PostgreSQL only: for SQLite see the tests of killed processes."""

from __future__ import annotations

import pytest

from tests.postgresql.conftest import Campaign
from tests.postgresql.server import Server

RESTARTS = 10


@pytest.mark.slow
def test_server_restarts_under_load(own_server: Server, campaign: Campaign) -> None:
    """After ten restarts, half of them without a shutdown, no caller hangs, and each unit is stored once."""
    with campaign(own_server.url(), RESTARTS) as load:
        for number in range(RESTARTS):
            load.killing()
            own_server.restart("fast" if number % 2 else "immediate")
            load.wait_for_turns(2)
    assert max(last for _, last in load.outages) < 20
