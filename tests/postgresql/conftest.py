"""Every test of this folder runs on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from homeagent import Database
from tests.conftest import Children, RecordProperty
from tests.postgresql.load import Load
from tests.postgresql.server import Installation, Server, free_port

Campaign = Callable[..., AbstractContextManager[Load]]


@pytest.fixture
def engine_name() -> str:
    """The engine of `target` and `database` in this folder."""
    return "postgresql"


@pytest.fixture
def own_server(installation: Installation, public_directory: Path) -> Iterator[Server]:
    """A separate server, which the test can restart."""
    server = Server(installation, public_directory / "server", port=free_port())
    server.create({"fsync": "off", "shared_buffers": "16MB"})
    server.start()
    yield server
    if server.is_running:
        server.stop("immediate")


@pytest.fixture
def campaign(children: Children, tmp_path: Path, record_property: RecordProperty) -> Campaign:
    """Return a context manager that loads a store during its block, and then checks the store and the outages."""

    @contextmanager
    def run(url: str, outages: int, lost: Sequence[str] = ()) -> Iterator[Load]:
        with Database.open(url) as database:
            load = Load(children, url, tmp_path)
            load.start()
            yield load
            load.stop()
            load.check(database)
        if lost:
            load.record(record_property, lost)
        assert len(load.outages) == outages

    return run
