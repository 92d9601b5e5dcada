"""Every test of this folder runs on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgresql.server import Installation, Server, free_port


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
