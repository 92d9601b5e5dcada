"""The doctor on a primary and its synchronous standby, on each of them and when one is gone. PostgreSQL only."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from homeagent import Database, Diagnosis, diagnose
from homeagent.maintenance.doctor import Severity
from tests.postgresql.load import wait_for
from tests.postgresql.server import Installation
from tests.postgresql.test_failover import Pair


@pytest.fixture
def pair(installation: Installation) -> Iterator[Pair]:
    """Two fresh servers, which wait for the disk and for each other."""
    directory = Path(tempfile.mkdtemp(prefix="homeagent-doctor-"))
    directory.chmod(0o755)
    pair = None
    try:
        pair = Pair(installation, directory)
        yield pair
    finally:
        if pair is not None:
            pair.stop()
        shutil.rmtree(directory, ignore_errors=True)


def bad(found: Diagnosis) -> dict[str, Severity]:
    """Return what is not ok."""
    return {finding.check: finding.severity for finding in found.findings if finding.severity is not Severity.OK}


@pytest.mark.slow
def test_a_standby_and_its_primary(pair: Pair) -> None:
    """A pair is sound; its standby can't be written; where that is gone, the primary's commits would hang."""
    Database.open(pair.url).close()
    found = diagnose(pair.url)
    assert bad(found) == {}
    replication = found.finding("replication")
    assert replication is not None
    assert (replication.facts["standbys"], replication.facts["synchronous"]) == (1, 1)
    durability = found.finding("durability")
    assert durability is not None
    assert durability.facts == {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}

    standby = diagnose(pair.standby.url("homeagent"))
    assert bad(standby) == {"standby": Severity.CRITICAL}
    assert standby.not_checked == {}

    pair.standby.stop("immediate")
    wait_for("the standby to be missed", lambda: not pair.primary.execute("SELECT 1 FROM pg_stat_replication"))
    assert bad(diagnose(pair.primary.url("homeagent"))) == {"replication": Severity.CRITICAL}
    pair.standby.start()
    wait_for(
        "the standby to come back",
        lambda: pair.primary.execute("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"),
    )
    assert bad(diagnose(pair.url)) == {}
