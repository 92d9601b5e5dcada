"""The doctor on SQLite files: for each check, a file with exactly one problem, and the remedy."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from homeagent import AgentSessionCreate, Database, IdempotencyScope, Role, diagnose, errors
from homeagent.engine.sqlite.dialect import APSW_VERSION, SQLITE_VERSION
from homeagent.engine.sqlite.in_use import in_use_path
from homeagent.maintenance import Diagnosis
from homeagent.maintenance.doctor import CHECKS, Finding, Severity
from homeagent.migrations import REVISION
from tests.command_line import invoke
from tests.conftest import START, Children, FakeClock, add_agent, add_device
from tests.engine.files.conftest import needs_root, snapshot
from tests.migrations.old_databases import REVISIONS, change, fetch, few, old_database

# Commits, and waits for the end of the test, or kills itself.
WRITER = """
import os, sys
from homeagent import AgentCreate, Database
database = Database.open(sys.argv[1])
for number in range(5):
    database.agents.create(AgentCreate(id=f"a{number}", name="A", workspace_path="/srv"))
if sys.argv[2:]:
    os.kill(os.getpid(), 9)
print("ready", flush=True)
sys.stdin.readline()
"""


def look(path: Path, clock: FakeClock, **options: Any) -> Diagnosis:
    """Diagnose a file, and check that no file changed and that the diagnosis survives a round trip through JSON."""
    before = snapshot(path.parent)
    found = diagnose(path, clock=clock, **options)
    assert snapshot(path.parent) == before
    bad(found)
    return found


def at(diagnosis: Diagnosis, check: str) -> Any:
    """Return the finding of a check, which must have been made."""
    finding = diagnosis.finding(check)
    assert finding is not None, diagnosis.not_checked
    return finding


def bad(diagnosis: Diagnosis) -> dict[str, Severity]:
    """Return the findings that are not ok."""
    assert Diagnosis.model_validate_json(diagnosis.model_dump_json()) == diagnosis
    assert set(diagnosis.not_checked) | {finding.check for finding in diagnosis.findings} <= set(CHECKS)
    assert diagnosis.exit_status == max(finding.severity.exit_status for finding in diagnosis.findings)
    return {finding.check: finding.severity for finding in diagnosis.findings if finding.severity is not Severity.OK}


def only(diagnosis: Diagnosis, check: str, severity: Severity) -> Any:
    """Return the only finding that is not ok, and check its name and severity."""
    assert bad(diagnosis) == {check: severity}
    finding = at(diagnosis, check)
    assert finding.meaning
    assert finding.remedy
    return finding


def healthy(diagnosis: Diagnosis, *repaired: str) -> bool:
    """Return whether a diagnosis has no finding, and made these repairs."""
    return bad(diagnosis) == {} and [repair.check for repair in diagnosis.repairs] == list(repaired)


def run(finding: Finding) -> None:
    """Run the command of a finding; run homeagent's own commands in this process, to save time."""
    assert finding.command is not None
    program, *arguments = shlex.split(finding.command)
    if program == "homeagent":
        done = invoke(*arguments)
        assert done.exit_code == 0, done.output
    else:
        subprocess.run([program, *arguments], check=True, capture_output=True, timeout=60)


pytestmark = pytest.mark.usefixtures("on_a_disk")


@pytest.fixture
def path(sqlite_path: Path) -> Path:
    """A new, migrated file."""
    return sqlite_path


# No problems


def test_valid_file_has_no_problem(path: Path, clock: FakeClock) -> None:
    """With an admin, a session and an unexpired nonce, every SQLite check is made, and each is ok."""
    with Database.open(path, clock=clock) as database:
        add_device(database, "desk", role=Role.ADMIN, approved=True)
        add_agent(database)
        database.sessions.create(AgentSessionCreate(agent_id="ada"))
        database.nonces.consume("desk", "n", expires_at=clock.now + timedelta(minutes=1))
        database.idempotency_keys.insert(IdempotencyScope("desk", "m", "k"), 1, ttl=timedelta(hours=1))
    found = look(path, clock)
    assert [finding.check for finding in found.findings if finding.severity is not Severity.OK] == []
    assert (found.exit_status, found.severity, found.not_checked) == (0, Severity.OK, {})
    assert [finding.check for finding in found.findings] == list(CHECKS[: CHECKS.index("write_access")])
    assert (found.location, found.engine, found.checked_at) == (str(path), "sqlite", clock.now)
    assert at(look(path, clock, thorough=True), "integrity").facts["pragma"] == "integrity_check"
    facts = at(found, "database").facts
    assert (facts["sqlite_version"], facts["apsw_version"]) == (SQLITE_VERSION, APSW_VERSION)


def test_open_database_is_diagnosed(sqlite_database: Database) -> None:
    """`Database.doctor` sees recent commits, uses the database's clock, and leaves the database open."""
    add_device(sqlite_database, "desk", role=Role.ADMIN, approved=True)
    found = sqlite_database.doctor()
    assert (found.severity, found.checked_at) == (Severity.OK, START)
    assert at(found, "admins").facts == {"admins": 1, "devices": 1}
    add_device(sqlite_database, "lamp")
    assert at(sqlite_database.doctor(fix=True), "admins").facts["devices"] == 2


def test_temporary_database_is_diagnosed_while_it_is_open(clock: FakeClock) -> None:
    """`:memory:` has a file too, but only the process that opened it can diagnose it."""
    with Database.open(":memory:", clock=clock) as database:
        assert at(database.doctor(), "integrity").severity is Severity.OK
    with pytest.raises(errors.InvalidArgumentError, match=r"Database\.doctor"):
        diagnose(":memory:")


def test_database_with_another_writer_is_diagnosed(path: Path, clock: FakeClock, children: Children) -> None:
    """If another process has the file open with commits in the WAL, the diagnosis sees all commits."""
    process = children.start(WRITER, path)
    assert process.stdout.readline() == "ready\n"
    clock.advance(days=10_000)
    found = diagnose(path, clock=clock)
    assert found.severity is Severity.OK, found
    assert at(found, "clock").facts["newest_row_ahead_seconds"] < 0
    assert at(found, "wal").facts["wal_bytes"] > 0


def test_open_database_whose_file_is_missing(path: Path, clock: FakeClock) -> None:
    """If a program deleted the file of an open database, the diagnosis has a finding and raises no error."""
    with Database.open(path, clock=clock) as database:
        add_agent(database)
        for file in (path, path.with_name("homeagent.db-wal"), path.with_name("homeagent.db-shm")):
            file.unlink(missing_ok=True)
        found = database.doctor(fix=True)
        assert (at(found, "database").severity, found.repairs) == (Severity.CRITICAL, [])
        assert not path.exists()
    with pytest.raises(errors.DatabaseClosedError):
        database.doctor()


# The file


def test_missing_or_lost_file(path: Path, tmp_path: Path, clock: FakeClock) -> None:
    """The remedy creates a file that never existed; if the lock file shows that a file existed, no remedy does."""
    new = tmp_path / "store" / "h.db"
    finding = only(look(new, clock), "database", Severity.CRITICAL)
    assert not new.parent.exists()
    run(finding)
    assert at(look(new, clock), "database").severity is Severity.OK
    path.with_name("homeagent.db.lock").write_text("initialised\n")
    path.with_name("homeagent.db.lock").chmod(0o600)
    path.unlink()
    finding = only(look(path, clock), "database", Severity.CRITICAL)
    assert "restore" in finding.remedy
    assert finding.command is None


@pytest.mark.parametrize("size", [0, 100, 512])
def test_truncated_file(path: Path, clock: FakeClock, size: int) -> None:
    """An empty, a short and a header-less file are reported as damaged, with the newest backup, and none is changed."""
    backup = _backup(path, clock)
    os.truncate(path, size)
    found = look(path, clock)
    assert (found.exit_status, at(found, "database").severity) == (2, Severity.CRITICAL)
    if size:  # an empty file may be a file that `init` has not filled yet
        assert at(found, "database").command == f"homeagent restore {backup} --database {path}"
    assert found.finding("integrity") is None
    assert "integrity" in found.not_checked


@pytest.mark.parametrize(("begin", "end", "check"), [(0, 100, "database"), (4096, 8 * 4096, "integrity")])
def test_damaged_file(path: Path, clock: FakeClock, begin: int, end: int, check: str) -> None:
    """Zeroed pages are damage, whether the file can be opened or not, and even --fix changes no byte."""
    content = bytearray(path.read_bytes())
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)
    found = look(path, clock)
    assert (found.exit_status, at(found, check).severity) == (2, Severity.CRITICAL)
    assert "restore" in at(found, check).remedy
    fixed = look(path, clock, fix=True)
    assert (fixed.exit_status, fixed.repairs) == (2, [])


def test_index_without_rows(path: Path, clock: FakeClock) -> None:
    """If an index lacks rows, only a thorough diagnosis finds the difference."""
    change(
        path,
        "INSERT INTO agents (id, name, workspace_path, created_at) VALUES ('a', 'A', '/', 1)",
        "INSERT INTO sessions (session_id, agent_id, sender_id, created_at, last_active_at)"
        " VALUES ('s', 'a', 'sender', 1, 1)",
    )
    ((root,),) = fetch(path, "SELECT rootpage FROM sqlite_master WHERE name = 'idx_sessions_sender'")
    content = path.read_bytes()
    begin, end = (root - 1) * 4096, root * 4096
    assert b"sender" in content[begin:end]
    path.write_bytes(content[:begin] + content[begin:end].replace(b"sender", b"zender") + content[end:])
    assert at(look(path, clock), "integrity").severity is Severity.OK
    assert only(look(path, clock, thorough=True), "integrity", Severity.CRITICAL).facts["problems"] > 0
    change(path, "REINDEX")
    assert look(path, clock, thorough=True).severity is Severity.OK


def test_foreign_file(tmp_path: Path, clock: FakeClock) -> None:
    """Another application's database, a text file and a directory are reported and not changed."""
    other = tmp_path / "other.db"
    change(other, "CREATE TABLE t (a)")
    notes = tmp_path / "notes.db"
    notes.write_text("not a database\n" * 100)
    for path in (other, notes):
        path.chmod(0o600)
        only(look(path, clock), "database", Severity.CRITICAL)
    (tmp_path / "folder.db").mkdir(mode=0o700)
    found = look(tmp_path / "folder.db", clock)
    assert at(found, "files").severity is Severity.CRITICAL
    assert found.exit_status == 2


def test_wal_of_a_killed_process(path: Path, clock: FakeClock, children: Children) -> None:
    """Commits before a `kill -9` are read without a change of a file, and commits that SQLite would drop are found."""
    children.start(WRITER, path, "kill").wait(timeout=60)
    log, index = (path.with_name(f"homeagent.db{suffix}") for suffix in ("-wal", "-shm"))
    clock.advance(days=10_000)
    found = look(path, clock)
    assert "complete" in at(found, "wal").summary
    assert at(found, "rows").facts["rows"] == 7
    # Without its index the WAL is still read; SQLite creates a new index and no other file.
    index.unlink()
    before = snapshot(path.parent)
    assert at(diagnose(path, clock=clock), "rows").facts["rows"] == 7
    after = snapshot(path.parent)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() <= {index.name}
    assert stat.S_IMODE(index.stat().st_mode) == 0o600
    content = bytearray(log.read_bytes())
    content[32 + 24 + 100] ^= 0xFF
    log.write_bytes(content)
    finding = at(look(path, clock), "wal")
    assert finding.severity is Severity.CRITICAL
    assert "restore" in finding.remedy


@pytest.mark.parametrize(("mode", "severity"), [(0o644, Severity.WARNING), (0o666, Severity.CRITICAL)])
def test_loose_modes(path: Path, clock: FakeClock, mode: int, severity: Severity) -> None:
    """If other users can access the file or a backup, the finding's command or --fix makes both private."""
    path.chmod(mode)
    run(only(look(path, clock), "files", severity))
    assert look(path, clock).severity is Severity.OK
    path.chmod(mode)
    fixed = diagnose(path, clock=clock, fix=True)
    assert fixed.severity is Severity.OK
    assert [repair.check for repair in fixed.repairs] == ["files"]
    assert f"it had {mode:04o}" in fixed.repairs[0].action
    copy = path.with_name("homeagent.db.0004-x.backup")
    shutil.copy(path, copy)
    copy.chmod(0o640)
    only(look(path, clock), "files", Severity.WARNING)
    diagnose(path, clock=clock, fix=True)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (path, copy)} == {0o600}


def test_directory_writable_by_others(path: Path, clock: FakeClock) -> None:
    """If other users could replace the database, a finding reports it; --fix keeps the directory's mode."""
    path.parent.chmod(0o770)
    finding = only(look(path, clock), "directory", Severity.CRITICAL)
    assert diagnose(path, clock=clock, fix=True).repairs == []
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o770
    run(finding)
    assert look(path, clock).severity is Severity.OK


@needs_root
def test_file_of_another_user(path: Path, clock: FakeClock) -> None:
    """If a file belongs to root, the owner's gateway cannot open it; the finding's command changes the owner."""
    beside = path.with_name("homeagent.db.lock")
    beside.touch(mode=0o600)
    for file in (path.parent, path):
        os.chown(file, 65534, 65534)
    finding = only(look(path, clock), "files", Severity.CRITICAL)
    run(finding)
    assert look(path, clock).severity is Severity.OK


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_link_or_second_name(path: Path, clock: FakeClock, kind: str) -> None:
    """If the path is a link or has a second hard link, a finding reports it, and no database is opened."""
    real = path.with_name("real.db")
    path.rename(real)
    path.symlink_to(real) if kind == "link" else path.hardlink_to(real)
    found = look(path, clock)
    assert (found.exit_status, at(found, "files").severity) == (2, Severity.CRITICAL)
    path.unlink()
    real.rename(path)
    assert look(path, clock).severity is Severity.OK


def _backup(path: Path, clock: FakeClock) -> Path:
    with Database.open(path, clock=clock) as database:
        return database.backup(path.with_name("copy.backup"))


def test_old_backup(path: Path, clock: FakeClock) -> None:
    """A backup of last month is a warning, a backup of yesterday is ok, and a missing backup is only mentioned."""
    assert "No backup" in at(look(path, clock), "backup").summary
    _backup(path, clock)
    clock.advance(days=1)
    assert at(look(path, clock), "backup").facts["age_seconds"] == 86400
    clock.advance(days=30)
    only(look(path, clock), "backup", Severity.WARNING)


MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("function", "answer", "check", "severity"),
    [
        ("filesystem_kind", "nfs4", "filesystem", Severity.CRITICAL),
        ("filesystem_kind", "tmpfs", "filesystem", Severity.WARNING),
        ("shutil.disk_usage", SimpleNamespace(free=20 * MIB), "disk_space", Severity.WARNING),
        ("shutil.disk_usage", SimpleNamespace(free=10 * MIB), "disk_space", Severity.CRITICAL),
    ],
)
def test_unsuitable_file_system(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, function: str, answer: Any, check: str, severity: Any
) -> None:
    """A network file system, a file system in memory, and too little space for a copy or for writes are findings."""
    monkeypatch.setattr(f"homeagent.maintenance.doctor.files.{function}", lambda path: answer)
    facts = only(look(path, clock), check, severity).facts
    assert answer in (facts.get("kind"), SimpleNamespace(free=facts.get("free_bytes")))


def test_rollback_mode(path: Path, clock: FakeClock) -> None:
    """--fix switches a file in rollback mode to WAL mode; with a pending journal only an open may read the rows."""
    change(path, "PRAGMA journal_mode=DELETE")
    only(look(path, clock), "wal", Severity.WARNING)
    assert healthy(diagnose(path, clock=clock, fix=True), "wal")
    assert fetch(path, "PRAGMA journal_mode") == [("wal",)]
    journal = path.with_name("homeagent.db-journal")
    journal.write_bytes(bytes(512))
    journal.chmod(0o600)
    run(only(look(path, clock), "database", Severity.WARNING))
    journal.unlink(missing_ok=True)
    assert look(path, clock).severity is Severity.OK


def test_interrupted_restore(path: Path, clock: FakeClock) -> None:
    """If the lock file describes an unfinished restore, the finding's command finishes the restore.

    A restore that was interrupted between two renames leaves two names of a file.
    """
    in_use_path(path).touch(mode=0o600)
    in_use_path(path).write_text("swap 1 2 end\n")
    finding = only(look(path, clock), "database", Severity.WARNING)
    assert "interrupted" in finding.summary
    path.with_name("second").hardlink_to(path)
    assert at(look(path, clock), "database") == finding
    path.with_name("second").unlink()
    run(finding)
    assert look(path, clock).severity is Severity.OK


def test_large_wal(path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a WAL is large, a finding reports it."""
    monkeypatch.setattr("homeagent.maintenance.doctor.sqlite.WAL_LIMIT", 5000)
    with Database.open(path, clock=clock) as database:
        add_agent(database)
        only(database.doctor(), "wal", Severity.WARNING)
    assert look(path, clock).severity is Severity.OK


# The schema


@pytest.mark.parametrize("revision", few(*REVISIONS[:-1:3], of=REVISIONS[:-1]))
def test_older_schema(tmp_path: Path, clock: FakeClock, revision: str) -> None:
    """An old file is checked as far as its columns allow; the finding's command upgrades it, --fix does not."""
    path = old_database(tmp_path, revision)
    clock.advance(days=10_000)
    found = look(path, clock)
    finding = at(found, "schema_revision")
    assert (finding.severity, finding.facts) == (Severity.WARNING, {"revision": revision, "needed": REVISION})
    assert "schema" in found.not_checked
    assert at(found, "integrity").severity is Severity.OK
    assert [r.check for r in diagnose(path, clock=clock, fix=True).repairs] == []
    assert finding.command == f"homeagent migrate --database {path}"
    run(finding)
    upgraded = diagnose(path, clock=clock)
    assert at(upgraded, "schema_revision").severity is at(upgraded, "schema").severity is Severity.OK


# Statements that make a problem, the check that finds the problem, its facts, and a statement that ends the problem.
PROBLEMS: dict[str, tuple[str, str, dict[str, Any] | None, str]] = {
    "a newer schema": (
        "UPDATE homeagent_schema_version SET version_num = '9999'; UPDATE store SET oldest_revision = '9999'",
        "schema_revision",
        None,
        f"UPDATE store SET oldest_revision = '{REVISION}'",  # the newer schema declares that this version may use it
    ),
    "no version table": ("DROP TABLE homeagent_schema_version", "schema_revision", None, ""),
    "no epoch": ("DELETE FROM store", "store_record", {"rows": 0, "epoch": None}, ""),
    "a session without its agent": (
        "PRAGMA foreign_keys=OFF;"
        " INSERT INTO sessions (session_id, agent_id, created_at, last_active_at) VALUES ('s', 'gone', 1, 1)",
        "references",
        {"broken": 1, "sessions": 1, "keys": 0},
        "INSERT INTO agents (id, name, workspace_path, created_at) VALUES ('gone', 'G', '/srv', 1)",
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_critical_state_of_another_program(path: Path, clock: FakeClock, problem: str) -> None:
    """A schema, an epoch or a reference that no version of homeagent leaves behind is critical until it is repaired."""
    statements, check, facts, repair = PROBLEMS[problem]
    change(path, statements)
    finding = only(look(path, clock), check, Severity.CRITICAL)
    assert facts in (None, finding.facts)
    if repair:
        change(path, repair)
        assert look(path, clock).severity is Severity.OK


def rewritten(definition: str, instead: str) -> str:
    """Return statements that replace a part of the definition of the table devices."""
    definition, instead = (text.replace("'", "''") for text in (definition, instead))
    return (
        "PRAGMA writable_schema=ON;"
        f"UPDATE sqlite_master SET sql = replace(sql, '{definition}', '{instead}') WHERE name = 'devices'"
    )


# The manual change, its severity, and the names in the finding.
WARNING, CRITICAL = Severity.WARNING, Severity.CRITICAL
DRIFTS: list[tuple[str, Severity, str]] = [
    ("DROP INDEX idx_sessions_sender", WARNING, "idx_sessions_sender"),
    ("DROP INDEX idx_sessions_route", CRITICAL, "idx_sessions_route"),
    ("DROP INDEX idx_sessions_route; CREATE INDEX idx_sessions_route ON sessions (route_key)", CRITICAL, "route"),
    ("DROP INDEX idx_idempotency_lease;"
     " CREATE INDEX idx_idempotency_lease ON idempotency_keys (lease_expires_at)", WARNING, "idx_idempotency_lease"),
    ("CREATE INDEX mine ON devices (role)", WARNING, "mine"),
    ("CREATE UNIQUE INDEX mine ON devices (role)", CRITICAL, "mine"),
    ("ALTER TABLE devices ADD COLUMN note TEXT", WARNING, "devices.note"),
    ("DROP INDEX idx_sessions_route; ALTER TABLE sessions DROP COLUMN route_key", CRITICAL, "sessions.route_key"),
    ("ALTER TABLE agents RENAME COLUMN name TO title", CRITICAL, "agents.name"),
    ("DROP TABLE sessions", CRITICAL, "table sessions"),
    ("CREATE TRIGGER t AFTER INSERT ON devices BEGIN UPDATE devices SET approved = 1; END", CRITICAL, "trigger t"),
    (rewritten("'node', 'admin')", "'node', 'admin', 'king')"), CRITICAL, "ck_devices_role"),
    (rewritten("shared_secret_hash TEXT NOT NULL", "shared_secret_hash TEXT"), CRITICAL, "devices.shared_secret_hash"),
    (rewritten("approved INTEGER", "approved BOOLEAN"), CRITICAL, "devices.approved"),
    (rewritten("approved INTEGER DEFAULT 0", "approved INTEGER DEFAULT 1"), CRITICAL, "devices.approved"),
    (rewritten("PRIMARY KEY (id)", "PRIMARY KEY (role)"), CRITICAL, "pk_devices"),
    (rewritten("role TEXT NOT NULL", "role TEXT COLLATE NOCASE NOT NULL"), CRITICAL, "devices.role"),
]  # fmt: skip


@pytest.mark.parametrize(("statements", "severity", "named"), DRIFTS)
def test_a_schema_changed_by_hand(
    path: Path, clock: FakeClock, statements: str, severity: Severity, named: str
) -> None:
    """Each change of a table, a column, a definition, an index or a trigger is named, with a fitting severity."""
    change(path, statements)
    finding = at(look(path, clock), "schema")
    assert finding.severity is severity
    assert named in finding.summary


def test_a_missing_index_is_made_by_its_remedy(path: Path, clock: FakeClock) -> None:
    """The remedy of a missing index is the complete statement that creates it, WHERE included."""
    for name in ("idx_sessions_route", "idx_idempotency_lease", "idx_sessions_agent_active"):
        change(path, f"DROP INDEX {name}")
        remedy = at(look(path, clock), "schema").remedy
        change(path, remedy[remedy.index("CREATE ") :])
        assert look(path, clock).severity is Severity.OK


# The rows, on both engines


def test_clock_set_back(database: Database, clock: FakeClock) -> None:
    """Rows from the future mean that the clock was set back; past the nonces' grace a replay could be accepted."""
    add_agent(database)
    for back, severity in ((timedelta(minutes=30), Severity.WARNING), (timedelta(hours=2), Severity.CRITICAL)):
        clock.advance(-back)
        finding = only(database.doctor(), "clock", severity)
        assert finding.facts == {"newest_row_ahead_seconds": back.total_seconds()}
        clock.advance(back)
    assert healthy(database.doctor())


def test_backlog(database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """If many expired rows were not swept, a finding counts them, until a sweep deletes them."""
    monkeypatch.setattr("homeagent.maintenance.doctor.store.BACKLOG", 3)
    with database.unit_of_work() as unit:
        for number in range(3):
            unit.nonces.consume("desk", f"n{number}", expires_at=clock.now + timedelta(minutes=1))
            unit.idempotency_keys.insert(IdempotencyScope("d", "m", f"k{number}"), 1, ttl=timedelta(minutes=1))
    add_device(database, "d", role=Role.ADMIN, approved=True)
    clock.advance(hours=2)
    finding = only(database.doctor(), "expired_backlog", Severity.WARNING)
    assert finding.facts == {"nonces": 3, "keys": 3}
    database.sweep()
    assert healthy(database.doctor())


def test_effects_without_an_outcome(database: Database, clock: FakeClock) -> None:
    """An expired lease, which --fix never settles, and a key of an absent device are findings until the end."""
    desk, ghost = (IdempotencyScope(name, "door.open", "k") for name in ("desk", "ghost"))
    add_device(database, "desk", role=Role.ADMIN, approved=True)
    database.idempotency_keys.claim(desk, fingerprint="f", lease=timedelta(minutes=1), ttl=timedelta(hours=1))
    assert healthy(database.doctor())
    clock.advance(minutes=1)
    finding = only(database.doctor(), "abandoned_effects", Severity.WARNING)
    assert finding.facts == {"keys": 1}
    assert finding.command == f"homeagent keys abandoned --database {shlex.quote(database.status().location)}"
    assert database.doctor(fix=True).repairs == []
    database.idempotency_keys.resolve(desk, True)
    assert healthy(database.doctor())
    database.idempotency_keys.insert(ghost, 1, ttl=timedelta(hours=1))
    broken = {"broken": 0} if database.doctor().engine == "sqlite" else {}
    assert only(database.doctor(), "references", Severity.WARNING).facts == {"sessions": 0, "keys": 1} | broken
    clock.advance(hours=2)
    database.sweep()
    assert healthy(database.doctor())


def test_sessions_with_the_key_of_another_route(database: Database) -> None:
    """Sessions that an UPDATE moved are counted; --fix gives the last active session its route and the others none."""
    add_agent(database)
    ids = [database.sessions.resolve(agent_id="ada", sender_id=sender).session_id for sender in ("a", "b", "c")]
    with database.unit_of_work() as unit:
        unit.session.connection().execute(text("UPDATE sessions SET sender_id = 'c' WHERE sender_id = 'b'"))
        unit.session.connection().execute(text("UPDATE sessions SET sender_id = 'b' WHERE sender_id = 'a'"))
    assert at(database.doctor(), "routes").facts == {"sessions": 2}
    assert healthy(database.doctor(fix=True), "routes")
    for sender, session_id in (("b", ids[0]), ("c", ids[2])):
        assert database.sessions.resolve(agent_id="ada", sender_id=sender).session_id == session_id
    assert database.sessions.resolve(agent_id="ada", sender_id="a").session_id not in ids


def test_no_approved_admin(database: Database) -> None:
    """Devices without an approved admin are a finding."""
    assert healthy(database.doctor())
    add_device(database, "desk", role=Role.ADMIN)
    assert only(database.doctor(), "admins", Severity.WARNING).facts == {"admins": 0, "devices": 1}
    database.devices.approve("desk")
    assert healthy(database.doctor())


# A statement that stores an unreadable value, and the problem in the finding.
ODD_VALUES = {
    "no JSON": ("UPDATE devices SET metadata = 'hello'", "devices.metadata holds a value that can't be read"),
    "another type": ("UPDATE devices SET paired_at = 'today'", "devices.paired_at holds a value of type str"),
    "a time beyond the year 9999": ("UPDATE devices SET last_seen_at = 1 << 60", "devices.last_seen_at holds a value"),
    "NUL": ("UPDATE devices SET revoked_reason = CAST(x'6100' AS TEXT)", "devices.revoked_reason holds a value"),
    "no UTF-8": ("UPDATE agents SET name = CAST(x'ff' AS TEXT)", "agents.name holds text that is not UTF-8"),
    "bytes": ("UPDATE sessions SET sender_id = x'65'", "sessions.sender_id holds a value of type bytes"),
    "a secret": ("UPDATE nonces SET created_at = 'geheim'", "nonces.created_at holds a value of type str"),
}


@pytest.mark.parametrize("kinds", [*([kind] for kind in ODD_VALUES), ["no UTF-8", "no JSON", "bytes"]], ids=str)
def test_unreadable_row(path: Path, clock: FakeClock, kinds: list[str]) -> None:
    """The doctor reads every row, and names the table, the column and the key of an unreadable row, but no secret."""
    with Database.open(path, clock=clock) as database:
        add_device(database, "desk", role=Role.ADMIN, approved=True)
        add_agent(database)
        session = database.sessions.resolve(agent_id="ada", sender_id="anna").session_id
        database.nonces.consume("desk", "geheim", expires_at=clock.now + timedelta(minutes=1))
    assert look(path, clock).severity is Severity.OK
    change(path, *(ODD_VALUES[kind][0] for kind in kinds))
    found = look(path, clock)
    finding = at(found, "rows")
    assert (finding.severity, finding.facts["unreadable"]) == (Severity.CRITICAL, len(kinds))
    for statement, named in (ODD_VALUES[kind] for kind in kinds):
        keys = {"devices": "id 'desk'", "agents": "id 'ada'", "sessions": session, "nonces": "device_id 'desk'"}
        assert named in finding.summary
        assert keys[statement.split()[1]] in finding.summary
    assert "geheim" not in found.model_dump_json()
    assert diagnose(path, clock=clock, fix=True).repairs == []


# Limits of a diagnosis


def test_listener_of_the_host_application(path: Path, clock: FakeClock) -> None:
    """If the host application runs a PRAGMA on every connection, the doctor still works."""

    def set_synchronous(connection: Any, record: object) -> None:
        connection.execute("PRAGMA synchronous = NORMAL")

    event.listen(Engine, "connect", set_synchronous)
    try:
        assert look(path, clock).severity is Severity.OK
    finally:
        event.remove(Engine, "connect", set_synchronous)


def test_no_finding_shows_a_secret(database: Database, clock: FakeClock) -> None:
    """If every check of rows has a finding, the output contains no id, hash, nonce, key or result."""
    secrets = ("geheim-id", "geheim-nonce", "geheim-key", "geheim-result", "geheim-session", "sha256$of-geheim-id")
    add_device(database, secrets[0], approved=True)
    add_device(database, secrets[0] + "-waiting")
    database.rotate_secret(secrets[0], overlap=timedelta(minutes=1))
    with database.unit_of_work() as unit:
        unit.nonces.consume(secrets[0], secrets[1], expires_at=clock.now + timedelta(minutes=1))
        unit.idempotency_keys.insert(IdempotencyScope("geheim", "geheim", secrets[2]), secrets[3], ttl=timedelta(1))
        unit.idempotency_keys.claim(
            IdempotencyScope("geheim", "geheim", "2"), fingerprint="f", lease=timedelta(seconds=1), ttl=timedelta(1)
        )
    clock.advance(days=30)
    found = database.doctor(fix=True)
    assert set(bad(found).values()) == {Severity.WARNING}
    assert "geheim" not in found.model_dump_json()


def test_slow_check_is_cut_off(path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a check exceeds its time limit, it is listed as not made, and a thorough diagnosis makes it."""
    change(
        path,
        "INSERT INTO agents (id, name, workspace_path, created_at)"
        " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)"
        " SELECT 'a' || i, 'A', '/', 1 FROM n",
    )
    # SQLite compares the clock with the limit every 10,000 instructions, which only some checks need.
    monkeypatch.setattr("homeagent.maintenance.doctor.diagnosis.QUICK", timedelta(microseconds=1))
    found = look(path, clock)
    assert "--thorough" in found.not_checked["integrity"]
    assert found.finding("integrity") is None
    assert found.severity is Severity.OK
    assert look(path, clock, thorough=True).not_checked == {}
