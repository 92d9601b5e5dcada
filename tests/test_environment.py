"""Settings from the environment: an argument wins over its variable, and an invalid value is named."""

from __future__ import annotations

import inspect
from datetime import timedelta
from pathlib import Path

import pytest

from homeagent import Database
from homeagent.errors import InvalidArgumentError


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path for a database, and an environment with all variables."""
    path = tmp_path / "data" / "named.db"
    for name, value in {
        "DATABASE": str(path),
        "DURABILITY": "normal",
        "BUSY_TIMEOUT": "0.25",
        "POOL_SIZE": "3",
    }.items():
        monkeypatch.setenv(f"HOMEAGENT_{name}", value)
    return path


def test_the_environment_sets_what_the_caller_leaves_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables replace the defaults, and not the arguments, even if an argument has the default's value."""
    with Database.open() as database:
        assert (database.status().location, database.status().durability) == (str(path), "normal")
        assert database._timeout == 0.25
    with Database.open(busy_timeout=timedelta(seconds=30), durability="full", pool_size=10) as database:
        assert (database.status().durability, database._timeout) == ("full", 30)
    for name in ("DURABILITY", "BUSY_TIMEOUT", "POOL_SIZE"):
        monkeypatch.setenv(f"HOMEAGENT_{name}", "")
    with Database.open() as database:
        assert (database.status().durability, database._timeout) == ("full", 30)


def test_the_signature_shows_the_defaults() -> None:
    """The signature shows the values that apply without an argument and without a variable."""
    parameters = inspect.signature(Database.open).parameters
    shown = [parameters[name].default for name in ("busy_timeout", "durability", "pool_size")]
    assert shown == [timedelta(seconds=30), "full", 10]


def test_the_pool_size_reaches_the_server(empty_postgres_url: str, path: Path) -> None:
    """On PostgreSQL the variable limits the connections, unless the caller passes the argument."""
    with Database.open(empty_postgres_url) as database:
        assert database._engine.writers._size == 3
    with Database.open(empty_postgres_url, pool_size=10) as database:
        assert database._engine.writers._size == 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE", "host=db password=private"),
        ("DATABASE", "postgres://user:private@db/x"),
        ("DATABASE", "private/"),
        ("DURABILITY", "private"),
        ("BUSY_TIMEOUT", "private"),
        ("BUSY_TIMEOUT", "-1"),
        ("BUSY_TIMEOUT", "inf"),
        ("POOL_SIZE", "0"),
        ("POOL_SIZE", "1001"),
        ("POOL_SIZE", "1.5"),
    ],
)
def test_an_invalid_value_names_its_variable(
    path: Path, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the variable. A value that can hold a password is not shown."""
    monkeypatch.setenv(f"HOMEAGENT_{name}", value)
    with pytest.raises(InvalidArgumentError, match=f"HOMEAGENT_{name}") as caught:
        Database.open()
    assert "password=private" not in str(caught.value)
    assert "user:private" not in str(caught.value)
    assert not path.exists()
