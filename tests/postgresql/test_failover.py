"""A primary with a synchronous standby: failures under load, and the doctor. PostgreSQL only."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from homeagent import Database, diagnose
from homeagent.maintenance import Diagnosis
from homeagent.maintenance.doctor import Severity
from tests.conftest import ROOT
from tests.postgresql.conftest import Campaign
from tests.postgresql.load import wait_for
from tests.postgresql.server import Installation, Server, free_port

ROUNDS = 5
PAGE = (ROOT / "docs" / "postgresql.md").read_text(encoding="utf-8")
WAIT_FOR_STANDBY, PROMOTE = (
    [line.partition(" -- ")[0] for line in block.splitlines()]
    for block in re.findall(r"^```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
)


class Pair:
    """Two servers: a primary, and a standby that each commit waits for. The methods do an operator's work."""

    def __init__(self, installation: Installation, directory: Path) -> None:
        self.primary = Server(installation, directory / "a", port=free_port())
        self.primary.create({"wal_keep_size": "256MB"})
        self.primary.start()
        self.primary.execute("CREATE DATABASE homeagent")
        self._add_standby(directory / "b", free_port())

    @property
    def url(self) -> str:
        ports = f"{self.primary.port},{self.standby.port}"
        return f"postgresql://postgres@/homeagent?host=127.0.0.1,127.0.0.1&port={ports}&target_session_attrs=read-write"

    def _add_standby(self, directory: Path, port: int) -> None:
        """Create a standby of the primary, and let each commit wait for the standby from now on."""
        name = directory.name
        self.standby = self.primary.clone(directory, port=port, name=name)
        self.standby.start()
        for statement in WAIT_FOR_STANDBY:
            self.primary.execute(statement.replace("'b'", f"'{name}'"))
        wait_for(
            "a synchronous standby",
            lambda: self.primary.execute("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"),
        )

    def wait_for_waiting(self) -> None:
        """Wait until commits wait: the server's processes apply a setting with a delay."""
        wait_for(
            "commits that wait for the standby",
            lambda: self.primary.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"),
        )

    def promote(self) -> None:
        """Promote the standby. The new primary has no standby yet, so its commits must not wait."""
        for statement in PROMOTE:
            self.standby.execute(statement)
        self.primary, self.standby = self.standby, self.primary

    def rebuild(self) -> None:
        """Create the lost server again as the standby."""
        shutil.rmtree(self.standby.directory)
        assert self.standby.port is not None
        self._add_standby(self.standby.directory, self.standby.port)

    def stop(self) -> None:
        for server in (self.primary, self.standby):
            if server.is_running:
                server.stop("immediate")


@pytest.fixture
def pair(installation: Installation, public_directory: Path) -> Iterator[Pair]:
    pair = Pair(installation, public_directory)
    yield pair
    pair.stop()


@pytest.mark.slow
def test_failover(pair: Pair, campaign: Campaign) -> None:
    """If the primary fails five times under 8 writers, each acknowledged unit is stored exactly once."""
    with campaign(pair.url, ROUNDS, ["primary killed, standby promoted by the test"]) as load:
        for _ in range(ROUNDS):
            pair.wait_for_waiting()
            load.wait_for_turns(5)
            load.killing()
            pair.primary.kill()
            pair.promote()
            load.wait_for_turns(5)
            pair.rebuild()
        pair.wait_for_waiting()


def bad(found: Diagnosis) -> dict[str, Severity]:
    return {finding.check: finding.severity for finding in found.findings if finding.severity is not Severity.OK}


@pytest.mark.slow
def test_a_standby_and_its_primary(pair: Pair) -> None:
    """The doctor finds no problem of a primary with its standby, and reports the standby as read-only."""
    Database.open(pair.url).close()
    found = diagnose(pair.url)
    assert bad(found) == {}
    standby = diagnose(pair.standby.url("homeagent"))
    assert bad(standby) == {"write_access": Severity.CRITICAL}
    assert standby.not_checked == {}
