"""Invalid arguments that a new user passes: homeagent's error names the argument and the remedy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent import Database, IdempotencyScope
from homeagent.errors import CorruptDatabaseError, InvalidArgumentError, SchemaOutdatedError
from tests.conftest import START

LATER = START + timedelta(minutes=1)
SCOPE = IdempotencyScope(device_id="lamp", method="door.open", key="k-1")


def effect_that_yields(attempt: object) -> Iterator[int]:
    """Yield values that no caller reads, so the body does not run."""
    yield 1


def test_a_generator_function_as_effect_claims_no_key(database: Database) -> None:
    """If the effect is a generator function, `run_once` refuses the effect, and the key stays free."""
    with pytest.raises(InvalidArgumentError, match="effect is a generator function"):
        database.run_once(SCOPE, effect_that_yields)
    with pytest.raises(InvalidArgumentError, match="effect is a generator function"):
        asyncio.run(database.arun_once(SCOPE, effect_that_yields))
    with database.unit_of_work() as unit, pytest.raises(InvalidArgumentError, match="effect is a generator function"):
        unit.run_once(SCOPE, effect_that_yields)
    outcome = database.run_once(SCOPE, lambda attempt: "open")
    assert (outcome.value, outcome.replayed, outcome.attempt) == ("open", False, 1)


@pytest.mark.parametrize(("work", "message"), [(None, "a function"), (effect_that_yields, "a generator function")])
def test_work_that_is_no_function_begins_no_unit(database: Database, work: Any, message: str) -> None:
    """If `run` or `arun` gets a value that is not a function, or a generator function, no unit begins."""
    with pytest.raises(InvalidArgumentError, match=message):
        database.run(work)
    with pytest.raises(InvalidArgumentError, match=message):
        asyncio.run(database.arun(work))
    assert database.counters().units == 0


def test_sessions_that_are_no_iterable_are_not_indexed(database: Database) -> None:
    """If `index` gets no iterable, InvalidArgumentError names the type."""
    nothing: Any = None
    with pytest.raises(InvalidArgumentError, match="not NoneType"):
        database.sessions.index(nothing)


@pytest.mark.parametrize("form", ["{}/", "sqlite:///{}/"])
def test_a_target_that_ends_in_a_slash_is_a_directory(tmp_path: Path, form: str) -> None:
    """If a target ends in a slash, opening refuses the target and creates no file of the directory's name."""
    with pytest.raises(InvalidArgumentError, match=r"names a directory: name a file in it"):
        Database.open(form.format(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_missing_database_is_named_with_its_path(tmp_path: Path) -> None:
    """If no database exists, the error names the path, as the path may come from the environment."""
    path = tmp_path / "nowhere.db"
    with pytest.raises(SchemaOutdatedError, match=r"there is no database yet at .*check the name") as caught:
        Database.open(path, migrate=False)
    assert caught.value.location == str(path)
    assert str(path) in str(caught.value)
    with pytest.raises(SchemaOutdatedError) as caught:
        Database.begin_epoch(path)
    assert caught.value.location == str(path)


def test_an_unknown_engine_error_names_the_documented_form() -> None:
    """If the URL begins with `postgres://`, the error names `postgresql://` as the remedy and shows no password."""
    with pytest.raises(InvalidArgumentError, match="use a path, sqlite:/// or postgresql://") as caught:
        Database.open("postgres://u:hidden@127.0.0.1/x")
    assert "hidden" not in str(caught.value)


def test_a_file_that_is_not_a_database_is_named(tmp_path: Path) -> None:
    """If the file is not a database, the error names the path, and the file stays unchanged."""
    path = tmp_path / "notes.txt"
    path.write_text("milk, bread\n" * 100)
    path.chmod(0o600)
    with pytest.raises(CorruptDatabaseError, match=r"is not a SQLite database: check the path") as caught:
        Database.open(path)
    assert str(path) in str(caught.value)
    assert path.read_text() == "milk, bread\n" * 100


@pytest.mark.parametrize("wrong", [[], {}, {"id": "lamp"}, None, 7, b"lamp"], ids=repr)
def test_ids_that_are_not_text_are_refused(database: Database, wrong: Any) -> None:
    """If a client's JSON has a list, an object or another non-text as an id, the store refuses the argument."""
    with database.unit_of_work() as unit:
        calls: list[Callable[[], object]] = [
            lambda: unit.devices.find_by_id(wrong),
            lambda: unit.agents.find_by_id(wrong),
            lambda: unit.sessions.find_by_id(wrong),
            lambda: unit.nonces.consume(wrong, "n", expires_at=unit.now()),
            lambda: IdempotencyScope(device_id=wrong, method="m", key="k"),
        ]
        for call in calls:
            with pytest.raises(InvalidArgumentError, match=f"must be text, not {type(wrong).__name__}"):
                call()


def test_a_text_subclass_that_equals_an_id_is_checked(database: Database) -> None:
    """If an object of a text class equals every id, the store checks the object instead of a cached id."""

    class Alike(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return hash("lamp")

    with database.unit_of_work() as unit:
        assert unit.nonces.consume("lamp", "n-1", expires_at=LATER)
        with pytest.raises(InvalidArgumentError, match="backslash"):
            unit.nonces.consume(Alike("../lamp"), "n-2", expires_at=LATER)


def test_an_invalid_role_or_status_names_the_argument(database: Database) -> None:
    """If a role or a status is invalid, the error names the argument and the valid values."""
    wrong: Any = "boss"
    with database.unit_of_work() as unit:
        with pytest.raises(InvalidArgumentError, match=r"^role must be one of client, node, admin$"):
            unit.devices.list(role=wrong)
        with pytest.raises(InvalidArgumentError, match=r"^status must be one of pending, approved, revoked$"):
            unit.devices.list(status=wrong)
        with pytest.raises(InvalidArgumentError, match=r"^expected_role must be one of"):
            unit.devices.approve("lamp", expected_role=wrong)
        with pytest.raises(InvalidArgumentError, match=r"^expected_status must be one of"):
            unit.devices.approve("lamp", expected_status=wrong)
