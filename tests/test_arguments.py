"""Arguments as who is new here passes them: an error of ours that says what to pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from homeagent import Database, IdempotencyScope
from homeagent.errors import CorruptDatabaseError, InvalidArgumentError, SchemaOutdatedError

SCOPE = IdempotencyScope(device_id="lamp", method="door.open", key="k-1")


def effect_that_yields(attempt: object) -> Iterator[int]:
    """Never runs, as nobody asks for its values."""
    yield 1


def test_an_effect_that_yields_claims_no_key(database: Database) -> None:
    """A call of it runs nothing, so it is refused and not recorded as done; the same key then serves."""
    with pytest.raises(InvalidArgumentError, match="effect is a generator function"):
        database.run_once(SCOPE, effect_that_yields)
    with pytest.raises(InvalidArgumentError, match="effect is a generator function"):
        asyncio.run(database.arun_once(SCOPE, effect_that_yields))
    with database.unit_of_work() as unit, pytest.raises(InvalidArgumentError, match="effect is a generator function"):
        unit.run_once(SCOPE, effect_that_yields)
    outcome = database.run_once(SCOPE, lambda attempt: "open")
    assert (outcome.value, outcome.replayed, outcome.attempt) == ("open", False, 1)


@pytest.mark.parametrize("form", ["{}/", "sqlite:///{}/"])
def test_a_target_that_ends_in_a_slash_is_a_directory(tmp_path: Path, form: str) -> None:
    """It is refused, and no file of the directory's name is made."""
    with pytest.raises(InvalidArgumentError, match=r"names a directory: name a file in it"):
        Database.open(form.format(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_where_no_database_is_the_error_says_where_it_looked(tmp_path: Path) -> None:
    """The place may come from the environment, so the message names it."""
    path = tmp_path / "nowhere.db"
    with pytest.raises(SchemaOutdatedError, match=r"there is no database yet at .*check the name") as caught:
        Database.open(path, migrate=False)
    assert caught.value.location == str(path)
    assert str(path) in str(caught.value)
    with pytest.raises(SchemaOutdatedError) as caught:
        Database.begin_epoch(path)
    assert caught.value.location == str(path)


def test_an_unknown_engine_is_told_the_form_that_the_docs_use() -> None:
    """`postgres://` is refused with `postgresql://` as the remedy, and no password is shown."""
    with pytest.raises(InvalidArgumentError, match="use a path, sqlite:/// or postgresql://") as caught:
        Database.open("postgres://u:hidden@127.0.0.1/x")
    assert "hidden" not in str(caught.value)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    """The path may come from the environment, so the message that says to check it names it; the file is left alone."""
    path = tmp_path / "notes.txt"
    path.write_text("milk, bread\n" * 100)
    path.chmod(0o600)
    with pytest.raises(CorruptDatabaseError, match=r"is not a SQLite database: check the path") as caught:
        Database.open(path)
    assert str(path) in str(caught.value)
    assert path.read_text() == "milk, bread\n" * 100


@pytest.mark.parametrize("wrong", [[], {}, {"id": "lamp"}, None, 7, b"lamp"], ids=repr)
def test_what_is_no_text_is_no_id(database: Database, wrong: Any) -> None:
    """What a client's JSON may hold in the place of an id is refused as an argument, a list and an object too."""
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


def test_an_id_that_was_taken_once_is_no_reason_to_take_another(database: Database) -> None:
    """A text of another class may say that it equals an id, and is looked at for itself."""

    class Alike(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return hash("lamp")

    with database.unit_of_work() as unit:
        assert unit.devices.find_by_id("lamp") is None
        with pytest.raises(InvalidArgumentError, match="file name"):
            unit.devices.find_by_id(Alike("../lamp"))


def test_what_is_no_role_and_no_status_is_told_by_the_name_of_the_argument(database: Database) -> None:
    """The message names the argument and what it may be."""
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
