"""Two servers under Patroni fail under load, without an operator. PostgreSQL only.

The test needs the extra `test-patroni` and etcd: `.ci/run patroni` installs both.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.postgresql.conftest import Campaign
from tests.postgresql.patroni_cluster import PatroniCluster
from tests.postgresql.server import Installation

ETCD = shutil.which("etcd")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("patroni") is None or ETCD is None, reason="Patroni or etcd is missing: .ci/run patroni brings both"
    ),
]

ROUNDS = 2


@pytest.fixture
def cluster(installation: Installation, public_directory: Path) -> Iterator[PatroniCluster]:
    assert ETCD is not None
    cluster = PatroniCluster(installation, public_directory, ETCD)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        print(cluster.said())  # noqa: T201  pytest shows the text if the test fails


def test_patroni(cluster: PatroniCluster, campaign: Campaign) -> None:
    """If servers and whole nodes fail under 8 writers, each acknowledged unit is stored exactly once."""
    lost_parts = ["PostgreSQL of Patroni's leader killed", "PostgreSQL and Patroni of the leader killed"]
    with campaign(cluster.url, len(lost_parts) * ROUNDS, lost_parts) as load:
        for _ in range(ROUNDS):
            for whole in (False, True):
                cluster.wait_for_standby()
                load.wait_for_turns(5)
                lost = cluster.leader
                load.killing()
                if whole:
                    cluster.kill_node(lost)
                else:
                    lost.kill()  # the node's Patroni continues
                load.wait_for_turns(5)
                assert cluster.leader is not lost
                if whole:
                    cluster.start_node(lost)
        cluster.wait_for_standby()
