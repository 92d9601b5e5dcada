"""Every test of this folder runs on PostgreSQL."""

from __future__ import annotations

import pytest


@pytest.fixture
def engine_name() -> str:
    """The engine of `target` and `database` in this folder."""
    return "postgresql"
