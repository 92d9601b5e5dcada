"""`homeagent copy`: its output and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import make_url

from homeagent import Database, DevicePair
from homeagent.migrations import REVISION
from tests.command_line import invoke, old_store
from tests.conftest import add_agent, copy_template


def _rows(target: str | Path) -> dict[str, int]:
    with Database.open(target, migrate=False) as database:
        return database.status().rows


@pytest.fixture
def source(sqlite_template: Path, tmp_path: Path) -> Path:
    """A store with a device, in a file that no connection has open."""
    path = copy_template(sqlite_template, tmp_path / "source")
    with Database.open(path) as database:
        database.pair(DevicePair.model_validate({"id": "desk", "role": "admin"}))
    return path


def test_copy_to_a_server_and_back(source: Path, empty_postgres_url: str, tmp_path: Path) -> None:
    """`copy` copies a store to a server without tables, and from the server to a file that does not exist yet."""
    url = make_url(empty_postgres_url).set(password="geheim").update_query_dict({"sslpassword": "geheim"})
    server = url.render_as_string(hide_password=False)
    over = invoke("copy", source, server, "--json")
    assert over.exit_code == 0, over.output
    assert "geheim" not in over.output
    report = json.loads(over.stdout)
    assert report["source"] == str(source)
    assert report["target"].startswith("postgresql+psycopg://")
    assert report["rows"] == {"agents": 0, "devices": 1, "idempotency_keys": 0, "nonces": 0, "sessions": 0}
    back = tmp_path / "back" / "h.db"
    done = invoke("copy", server, back)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "geheim" not in done.output
    assert done.stdout.endswith(f"to {back}: 1 row, the same on both sides.\n")
    assert _rows(back) == _rows(source)
    assert back.stat().st_mode & 0o777 == 0o600
    again = invoke("copy", source, server)
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.count("\n") == 1
    assert "the target holds devices already" in again.stderr


def test_a_live_copy_is_marked(source: Path, tmp_path: Path) -> None:
    """With `--live` the source may have changed, so the output does not say that both sides are the same."""
    done = invoke("copy", "--live", source, tmp_path / "one" / "h.db")
    assert done.stdout.endswith(": 1 row, as it was at the beginning.\n")
    assert json.loads(invoke("copy", "--live", "--json", source, tmp_path / "two" / "h.db").stdout)["live"] is True
    assert json.loads(invoke("copy", "--json", source, tmp_path / "three" / "h.db").stdout)["live"] is False


def test_progress_is_shown_on_a_terminal(source: Path, tmp_path: Path) -> None:
    """If standard error is a terminal, each step shows a bar there, but not with `--json`."""
    with Database.open(source) as database:
        for number in range(20):
            add_agent(database, f"agent-{number}")
    environment = {"TERM": "xterm", "COLUMNS": "100"}
    done = invoke("copy", source, tmp_path / "one" / "h.db", env=environment, terminal=True)
    assert done.exit_code == 0
    for text in ("copying", "comparing", "22/22"):  # with the row that identifies the store
        assert text in done.stderr
    assert "copying" not in done.stdout
    program = invoke("copy", source, tmp_path / "two" / "h.db", "--json", env=environment, terminal=True)
    assert (program.exit_code, program.stderr) == (0, "")


def test_a_third_database_is_wrong_usage(source: Path, tmp_path: Path) -> None:
    """If `--database` precedes the command, the status is 2, as the option would name a third database."""
    done = invoke("--database", source, "copy", source, tmp_path / "two.db")
    assert done.exit_code == 2
    assert "SOURCE and TARGET" in done.stderr


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("postgresql://me:geheim@127.0.0.1:1/db?password=geheim", "new.db"),
        ("there.db", "postgresql://me:geheim@127.0.0.1:1/db?password=geheim"),
        ("mysql://me:geheim@127.0.0.1/db", "new.db"),
        ("there.db", ":memory:"),
        (":memory:", "new.db"),
        ("absent.db", "new.db"),
        ("there.db", "there.db"),
        ("there.db", "../source/there.db"),
    ],
)
def test_refusals_are_one_line(one: str, two: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a database can't be copied, `copy` ends with status 1 and a one-line error without password or new file."""
    for path in source.parent.glob("h.db*"):
        path.rename(path.with_name(path.name.replace("h.db", "there.db", 1)))
    monkeypatch.chdir(source.parent)
    before = sorted(path.name for path in source.parent.iterdir())
    done = invoke("copy", one, two)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    assert done.stderr.count("\n") == 1
    assert "geheim" not in done.output
    assert sorted(path.name for path in source.parent.iterdir()) == before


def test_an_old_schema_is_upgraded_by_its_owner_alone(source: Path, tmp_path: Path) -> None:
    """If the source or the target is at an older revision, `copy` names the remedy and keeps the revision."""
    old = old_store(tmp_path / "old")
    before = old.read_bytes()
    for arguments in ([old, tmp_path / "new" / "h.db"], [source, old]):
        done = invoke("copy", *arguments)
        assert (done.exit_code, done.stdout) == (1, "")
        for words in ("'0002'", f"needs {REVISION!r}", "homeagent migrate"):
            assert words in done.stderr
    assert not (tmp_path / "new").exists()
    assert old.read_bytes() == before
