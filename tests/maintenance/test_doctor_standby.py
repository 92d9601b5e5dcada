"""The doctor on a primary and its synchronous standby. PostgreSQL only."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from homeagent import Database, diagnose
from homeagent.maintenance import Diagnosis
from homeagent.maintenance.doctor import Severity
from tests.postgresql.server import Installation
from tests.postgresql.test_failover import Pair


@pytest.fixture
def pair(installation: Installation) -> Iterator[Pair]:
    """Two new servers with fsync and synchronous replication."""
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
    """Return the findings that are not ok."""
    return {finding.check: finding.severity for finding in found.findings if finding.severity is not Severity.OK}


@pytest.mark.slow
def test_a_standby_and_its_primary(pair: Pair) -> None:
    """A primary with its standby has no problem, and the standby is reported as read-only."""
    Database.open(pair.url).close()
    found = diagnose(pair.url)
    assert bad(found) == {}
    durability = found.finding("durability")
    assert durability is not None
    assert durability.facts == {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}

    standby = diagnose(pair.standby.url("homeagent"))
    assert bad(standby) == {"write_access": Severity.CRITICAL}
    assert standby.not_checked == {}
