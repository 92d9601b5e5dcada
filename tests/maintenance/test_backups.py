"""Backups: complete, verified and private, in spite of errors while they are made; and which backups are kept.

SQLite only: PostgreSQL has its own tools, and the error of `Database.backup` names them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import threading
import time
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from homeagent import AgentCreate, Database, errors
from homeagent.engine.files.locks import FileLock
from homeagent.engine.sqlite import backup as engine_backup
from homeagent.engine.sqlite.dialect import connect
from homeagent.engine.sqlite.integrity import ContentCheck
from homeagent.engine.sqlite.manifests import backups_in, manifest_path, newest_backup, read_manifest
from homeagent.maintenance import BackupSchedule
from homeagent.maintenance.backups import back_up_if_due
from homeagent.migrations import REVISION
from tests.conftest import START, Children, FakeClock, RecordProperty, add_agent, add_device, postgres_database
from tests.maintenance import load
from tests.migrations.old_databases import change

DAY = timedelta(days=1)


def rows(path: Path, query: str) -> list[Any]:
    """Return the rows of a query on a file, opened read-only so that SQLite creates no file next to it."""
    with closing(connect(f"file:{path}?mode=ro", uri=True)) as raw:
        return list(raw.execute(query).fetchall())


def names(directory: Path) -> set[str]:
    """Return the names in a directory, without the lock file of the backups."""
    return {path.name for path in directory.iterdir()} - {".homeagent-backups.lock"}


def test_backup_into_a_directory(sqlite_database: Database, sqlite_path: Path, tmp_path: Path) -> None:
    """A backup is one private file with the committed rows, and its manifest describes the file correctly."""
    add_agent(sqlite_database)
    backup = sqlite_database.backup(tmp_path / "backups/")
    assert backup == tmp_path / "backups"
    backup = sqlite_database.backup(f"{tmp_path}/made/")
    assert backup == tmp_path / "made" / f"homeagent.db.{REVISION}-20260102T030405678000Z.backup"
    assert names(backup.parent) == {backup.name, f"{backup.name}.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in backup.parent.iterdir()} == {0o600}
    assert stat.S_IMODE(backup.parent.stat().st_mode) == 0o700
    manifest = json.loads(manifest_path(backup).read_text())
    assert manifest.pop("package_version")
    with closing(connect(f"file:{sqlite_path}?mode=ro", uri=True)) as raw:
        assert manifest.pop("schema_version") == raw.pragma("schema_version")
    assert manifest == {
        "format": 1,
        "kind": "backup",
        "database": str(sqlite_path),
        "taken_at": "2026-01-02T03:04:05.678000Z",
        "schema_revision": REVISION,
        "application_revision": None,
        "epoch": 1,
        "rows": {
            "agents": 1,
            "device_changes": 1,
            "devices": 0,
            "idempotency_keys": 0,
            "nonces": 0,
            "sessions": 0,
            "store": 1,
        },
        "size": backup.stat().st_size,
        "sha256": hashlib.sha256(backup.read_bytes()).hexdigest(),
    }
    assert newest_backup(sqlite_path) == backup


def test_existing_file_is_refused(sqlite_database: Database, sqlite_path: Path, tmp_path: Path) -> None:
    """If the path, or a WAL next to the path, exists, the backup raises an error, and never overwrites a database."""
    used, link, stale = tmp_path / "used", tmp_path / "link", tmp_path / "copy.db-wal"
    used.write_text("precious")
    link.symlink_to(tmp_path / "nowhere")
    stale.write_bytes(b"of another one")  # SQLite would apply the WAL to the backup
    other = tmp_path / "other" / "homeagent.db"
    with Database.open(other) as opened:
        add_agent(opened, "other")
        before = names(tmp_path), names(other.parent)
        for destination, replace, match in (
            (used, False, "exists already"),
            (link, False, "exists already"),
            (link, True, "symbolic link"),
            (tmp_path / "copy.db", False, r"copy\.db-wal"),
            (other, True, "is open or was not closed"),  # the commits of an open database would be lost
            *((f"{sqlite_path}{end}", True, "belongs to the database itself") for end in ("", "-wal", "-shm", ".lock")),
        ):
            with pytest.raises((errors.InvalidArgumentError, errors.InsecureFileError), match=match):
                sqlite_database.backup(destination, replace=replace)
        assert (names(tmp_path), names(other.parent)) == before
        assert used.read_text() == "precious"
        add_agent(opened, "another")
    sqlite_database.backup(other, replace=True)
    assert rows(other, "SELECT id FROM agents") == []


def test_keep_deletes_the_oldest_backups(
    sqlite_database: Database, sqlite_path: Path, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keep` deletes this database's oldest backups, but no upgrade's copy and no backup without a manifest."""
    directory = tmp_path / "backups"
    directory.mkdir()
    for _ in range(4):
        clock.advance(hours=1)
        sqlite_database.backup(directory)
    kept = sorted(directory.glob("*.backup"))
    # The first has no manifest, the second is an upgrade's copy, and the third is of another database with the same
    # name.
    manifest_path(kept[0]).unlink()
    for backup, fields in ((kept[1], {"kind": "upgrade"}), (kept[2], {"database": "/elsewhere/homeagent.db"})):
        manifest_path(backup).write_text(json.dumps({**json.loads(manifest_path(backup).read_text()), **fields}))
    clock.advance(hours=1)
    before = names(directory)
    with monkeypatch.context() as patch, pytest.raises(errors.CorruptDatabaseError):
        # A backup that fails deletes no older backup.
        patch.setattr(engine_backup, "read_contents", lambda *_: iter(()))
        sqlite_database.backup(directory, keep=1)
    assert names(directory) == before
    latest = sqlite_database.backup(directory, keep=1)
    assert names(directory) == {
        *(path.name for path in (*kept[:3], latest)),
        *(f"{path.name}.json" for path in (*kept[1:3], latest)),
    }
    # The clock is set back: the new backup looks oldest, and stays because the caller asked for it.
    clock.now = START - DAY
    back = sqlite_database.backup(directory, keep=1)
    assert set(directory.glob("*.backup")) == {*kept[:3], back}
    # The clock stands still: each backup gets another name.
    assert sqlite_database.backup(directory).name == back.name.replace(".backup", "-2.backup")
    assert newest_backup(sqlite_path) is not None
    for keep in (0, -1, True):
        with pytest.raises(errors.InvalidArgumentError):
            sqlite_database.backup(directory, keep=keep)


def test_keep_removes_the_oldest_of_one_time(sqlite_database: Database, sqlite_path: Path, tmp_path: Path) -> None:
    """If the clock stands still, `keep` deletes the backups that were made first."""
    directory = tmp_path / "backups"
    directory.mkdir()
    made = [sqlite_database.backup(directory, keep=3) for _ in range(12)]
    assert set(directory.glob("*.backup")) == set(made[-3:])
    assert made[-1].name.endswith("Z-12.backup")
    assert newest_backup(sqlite_path) == made[-1]


def test_keep_removes_backups_from_the_future_first(
    sqlite_database: Database, clock: FakeClock, tmp_path: Path
) -> None:
    """`keep` deletes backups with a time in the future first, or they would fill the places of new backups."""
    ahead, now = clock.now + 1000 * DAY, clock.now
    for start in (ahead, now):
        clock.now = start
        for _ in range(3):
            clock.advance(hours=1)
            sqlite_database.backup(f"{tmp_path}/backups/", keep=3)
    kept = [manifest.taken_at for _, manifest in backups_in(tmp_path / "backups", tmp_path / "homeagent.db")]
    assert kept == [now + timedelta(hours=hour) for hour in (1, 2, 3)]


def test_damaged_database(
    sqlite_path: Path, clock: FakeClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If an index is damaged, a backup raises an error and leaves no file, and a content check ends all later units."""
    with Database.open(sqlite_path) as database:
        for number in range(200):
            add_agent(database, f"agent-{number}")
    ((root,),) = rows(sqlite_path, "SELECT rootpage FROM sqlite_master WHERE name = 'idx_sessions_agent'")
    # Open the database before the damage: opening would find damage in so small a file.
    with Database.open(sqlite_path, clock=clock) as database:
        with sqlite_path.open("r+b") as file:
            # An index page with a count of three entries, but without the entries.
            file.seek((root - 1) * 4096 + 3)
            file.write(b"\x00\x03")
        with pytest.raises(errors.CorruptDatabaseError, match="newest good backup; no backup of the database is known"):
            database.backup(tmp_path / "copy.db")
        assert names(tmp_path) == {"database"}
        add_agent(database, "kept")
        check = ContentCheck(database._engine, every=timedelta(hours=1))
        with pytest.raises(errors.CorruptDatabaseError):
            check.run_if_due(lambda: False)
        assert "is damaged" in caplog.text
        with pytest.raises(errors.CorruptDatabaseError, match="is damaged"):
            add_agent(database, "lost")


def test_valid_database_is_checked_periodically(database: Database) -> None:
    """If a check finds no damage, no error is raised, and the next check is due after its interval (either engine)."""
    now = [0.0]
    counts = []
    stop = Mock(return_value=False)
    check = ContentCheck(database._engine, every=timedelta(hours=1), monotonic=lambda: now[0])
    for now[0] in (0.0, 0.0, 3600.0):
        check.run_if_due(stop)
        counts.append(stop.call_count)
    first, second, third = counts
    assert first == second
    assert (0 < first < third) == (database._engine.dialect_name == "sqlite")
    add_agent(database, "after")


def test_replaced_file_is_not_backed_up(sqlite_database: Database, sqlite_path: Path, tmp_path: Path) -> None:
    """If the open file was moved away, or another file took its name, the backup raises an error and makes no file."""
    away = tmp_path / "away.db"
    sqlite_path.rename(away)
    for _ in range(2):
        with pytest.raises(errors.DatabaseMovedError):
            sqlite_database.backup(tmp_path / "copy.db")
        assert names(tmp_path) == {"away.db", "database"}
        sqlite_path.touch(0o600)
    away.rename(sqlite_path)


def test_invalid_content_is_refused(sqlite_path: Path, tmp_path: Path) -> None:
    """If a row refers to an absent row, or the schema has no version, the backup raises, as a restore would."""
    absent = "INSERT INTO sessions (session_id, agent_id, created_at, last_active_at) VALUES ('s', 'gone', 1, 1)"
    change(sqlite_path, absent)
    with Database.open(sqlite_path) as database:
        with pytest.raises(errors.CorruptDatabaseError, match="refers to a row"):
            database.backup(tmp_path / "copy.db")
        with database.unit_of_work() as unit:
            unit.session.connection().exec_driver_sql("DELETE FROM sessions")
            unit.session.connection().exec_driver_sql("DROP TABLE homeagent_schema_version")
        with pytest.raises(errors.CorruptDatabaseError, match="the schema is missing"):
            database.backup(tmp_path / "copy.db")
    assert names(tmp_path) == {"database"}


def test_backup_does_not_wait_for_an_open_unit(sqlite_database: Database, tmp_path: Path) -> None:
    """If a write unit is open, a backup and a status neither wait for it, see its writes, nor delay it."""
    add_agent(sqlite_database, "committed")
    with sqlite_database.unit_of_work() as unit:
        unit.agents.create(AgentCreate(id="open", name="Open", workspace_path="/open"))
        backup = sqlite_database.backup(f"{tmp_path}/backups/")
        assert sqlite_database.backup(tmp_path / "copy.db").exists()
        status = sqlite_database.status()
    assert rows(backup, "SELECT id FROM agents") == [("committed",)]
    assert (status.rows["agents"], status.pragmas["journal_mode"]) == (1, "wal")


def test_writers_do_not_wait_for_a_backup(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writers commit between the steps of a backup, which has the first state; after an interrupt no file is left."""
    for number in range(50):
        add_agent(sqlite_database, f"agent-{number}")
    monkeypatch.setattr(engine_backup, "_STEP", 1)
    written = 0
    proceed = engine_backup._raise_if_stopped

    def write(stop: engine_backup.Stop) -> None:
        nonlocal written
        written += 1
        add_device(sqlite_database, f"device-{written}")
        proceed(stop)

    monkeypatch.setattr(engine_backup, "_raise_if_stopped", write)
    backup = sqlite_database.backup(tmp_path / "copy.db")
    assert written > 20
    assert rows(backup, "SELECT (SELECT count(*) FROM agents), (SELECT count(*) FROM devices)") == [(50, 0)]

    def interrupt(stop: engine_backup.Stop) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_backup, "_raise_if_stopped", interrupt)
    before = names(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sqlite_database.backup(tmp_path / "interrupted.db")
    assert names(tmp_path) == before


KILLED = """
import os, signal, sys
from homeagent import Database
from homeagent.engine.sqlite import backup

backup._STEP = 1
steps = 0

def kill(stop):
    global steps
    steps += 1
    if steps == 5:
        os.kill(os.getpid(), signal.SIGKILL)

backup._raise_if_stopped = kill
Database.open(sys.argv[1]).backup(sys.argv[2])
"""


def test_killed_backup(sqlite_path: Path, tmp_path: Path, children: Children) -> None:
    """If a backup is killed, no complete-looking file is left, and the next backup removes the rest."""
    directory = tmp_path / "backups"
    directory.mkdir()
    for destination in (directory, directory / "named.db"):
        child = children.start(KILLED, sqlite_path, destination)
        child.communicate()
        assert child.returncode == -9
        left = names(directory)
        assert left
        assert all(name.startswith(".") for name in left)
        with Database.open(sqlite_path) as database:
            made = database.backup(destination)
        assert names(directory) == {made.name, f"{made.name}.json"}
        made.unlink()
        manifest_path(made).unlink()


LIMITED = """
import resource, sys
from homeagent import AgentCreate, Database, errors

with Database.open(sys.argv[1]) as database:
    with database.unit_of_work() as unit:
        for number in range(300):
            unit.agents.create(AgentCreate(id=str(number), name="A", workspace_path="/a", config={"x": "y" * 1000}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        database.backup(sys.argv[2])
    except errors.DiskFullError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with database.unit_of_work() as unit:
        assert len(unit.agents.list(limit=1000)) == 300
        unit.agents.create(AgentCreate(id="after", name="A", workspace_path="/a"))
    database.backup(sys.argv[2])
"""


def test_limited_file_size(sqlite_path: Path, tmp_path: Path, children: Children) -> None:
    """If the file size limit is reached, an error says so and no file is left; the next backup works."""
    said = children.run(LIMITED, sqlite_path, tmp_path / "copy.db")
    assert "no room for a backup" in said
    assert names(tmp_path) == {"database", "copy.db", "copy.db.json"}
    assert rows(tmp_path / "copy.db", "SELECT count(*) FROM agents") == [(301,)]


@pytest.mark.parametrize("asked", [True, False])
def test_full_disk(sqlite_database: Database, small_disk: Path, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    """If the disk is full before or during a backup, an error is raised and no file is left."""
    if not asked:
        monkeypatch.setattr(engine_backup, "require_room", lambda *_: None)
    with sqlite_database.unit_of_work() as unit:
        for number in range(1200):
            unit.agents.create(AgentCreate(id=str(number), name="A", workspace_path="/a", config={"x": "y" * 1000}))
    for destination in (small_disk, small_disk / "copy.db"):
        with pytest.raises(errors.DiskFullError, match="no room for a backup"):
            sqlite_database.backup(destination)
    assert names(small_disk) == set()
    add_agent(sqlite_database, "after")


UNPRIVILEGED = """
import os, sys
import homeagent.maintenance.backups
from homeagent import Database, errors
from homeagent.engine.sqlite import backup

# Whatever is imported on the way: another user may not enter the folder of the packages.
import homeagent.version
Database.open(':memory:').close()
os.setuid(65534)
with Database.open(sys.argv[1]) as database:
    for spoil in (lambda: None, lambda: os.chmod(sys.argv[2], 0o500)):
        def verify(*arguments, verify=backup._verify, spoil=spoil, **named):
            verify(*arguments, **named)
            spoil()
        backup._verify = verify
        try:
            print(database.backup(sys.argv[2] + "/copy.db", replace=True))
        except errors.DatabaseError as error:
            print(error)
    os.chmod(sys.argv[2], 0)
    for call in (database.backup, Database.begin_epoch):
        try:
            call(sys.argv[2] + "/copy.db")
        except errors.DatabaseError as error:
            print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become another user")
def test_lost_permission(sqlite_path: Path, children: Children, public_directory: Path) -> None:
    """If a permission is lost before or during a backup, an error says so, and no file looks like a backup."""
    place = public_directory
    shutil.copytree(sqlite_path.parent, place / "database")
    (place / "backups").mkdir()
    for path in (place, *place.rglob("*")):
        os.chown(path, 65534, 65534)
    said = children.run(UNPRIVILEGED, place / "database" / "homeagent.db", place / "backups").splitlines()
    assert said[0].endswith("copy.db")
    assert ["no permission" in line for line in said[1:]] == [True, True, True]
    (place / "backups").chmod(0o700)
    left = [path for path in (place / "backups").iterdir() if "partial" in path.name]
    assert all(path.stat().st_size == 0 for path in left)
    assert rows(place / "backups" / "copy.db", "PRAGMA integrity_check") == [("ok",)]


def test_postgresql_names_its_own_tools(postgres_url: str, postgres_template: str) -> None:
    """On PostgreSQL the error names the server's own tools. PostgreSQL only."""
    with Database.open(postgres_database(postgres_url, postgres_template)) as database:
        for call in (
            lambda: database.backup("/nowhere/x"),
            lambda: database.sweeper(backups=BackupSchedule("/nowhere")),
        ):
            with pytest.raises(errors.DatabaseError, match=r"pg_dump.*pg_basebackup"):
                call()


def test_temporary_database(tmp_path: Path) -> None:
    """A temporary database can be backed up until it is closed; the backup needs neither a WAL nor write permission."""
    with Database.open(":memory:") as database:
        assert database.backup(tmp_path / "kept.db") == tmp_path / "kept.db"
        add_agent(database)
        with pytest.raises(errors.InvalidArgumentError, match="too long"):
            database.backup(tmp_path / ("x" * 300))
        # With `replace`, a backup replaces an earlier backup and its manifest.
        backup = database.backup(tmp_path / "kept.db", replace=True)
    manifest = read_manifest(backup)
    assert manifest is not None
    assert manifest.rows["agents"] == 1
    assert manifest.sha256 == hashlib.sha256(backup.read_bytes()).hexdigest()
    assert names(tmp_path) == {"kept.db", "kept.db.json"}
    with pytest.raises(errors.DatabaseClosedError):
        database.backup(tmp_path / "late.db")
    alone = tmp_path / "read-only"
    alone.mkdir()
    shutil.copy(backup, alone / "copy.db")
    (alone / "copy.db").chmod(0o400)
    alone.chmod(0o500)
    assert rows(alone / "copy.db", "PRAGMA journal_mode") == [("delete",)]
    assert rows(alone / "copy.db", "SELECT id FROM agents") == [("ada",)]
    assert names(alone) == {"copy.db"}
    with Database.open(backup) as kept:
        assert kept.agents.get("ada").name == "Ada"


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_lost_database_names_its_backup(sqlite_path: Path, tmp_path: Path, how: str) -> None:
    """If a database's file is missing or empty, the error names the newest backup and does not suggest `init`."""
    with Database.open(sqlite_path) as database:
        backup = database.backup(f"{tmp_path}/backups/")
    sqlite_path.unlink() if how == "gone" else os.truncate(sqlite_path, 0)
    for migrate in (True, False):
        with pytest.raises(errors.CorruptDatabaseError) as caught:
            Database.open(sqlite_path, migrate=migrate)
        assert str(backup) in str(caught.value)
        assert "init" not in str(caught.value)


@pytest.mark.parametrize("how", ["short", "version table", "version row"])
def test_damaged_file_names_its_backup(sqlite_path: Path, how: str) -> None:
    """If a database's file is too short or has lost its version, each error names the newest backup."""
    with Database.open(sqlite_path) as database:
        backup = database.backup(f"{sqlite_path.parent}/")
    if how == "short":
        os.truncate(sqlite_path, 50)
    else:
        change(sqlite_path, f"{'DROP TABLE' if how == 'version table' else 'DELETE FROM'} homeagent_schema_version")
    for call in (Database.open, partial(Database.open, migrate=False), Database.begin_epoch):
        with pytest.raises(errors.CorruptDatabaseError) as caught:
            call(sqlite_path)
        assert str(caught.value).count(str(backup)) == 1


@pytest.mark.parametrize("how", ["deleted", "replaced", "emptied", "without its WAL"])
def test_moved_file_names_its_backup(sqlite_path: Path, tmp_path: Path, how: str) -> None:
    """If an open database's file or WAL is lost, the error names the newest backup."""
    with Database.open(sqlite_path) as database:
        backup = database.backup(f"{tmp_path}/backups/")
        add_agent(database)
        kept = sqlite_path.with_name("kept")
        lost = sqlite_path.with_name(f"{sqlite_path.name}-wal") if how == "without its WAL" else sqlite_path
        content = lost.read_bytes()
        os.link(lost, kept)
        if how == "emptied":
            os.truncate(sqlite_path, 0)
        else:
            lost.unlink()
            if how == "replaced":
                shutil.copy(kept, lost)
        time.sleep(0.02)  # a check of the WAL is due after 10 ms
        for _ in range(2):
            with pytest.raises(errors.DatabaseMovedError) as caught, database.unit_of_work() as unit:
                unit.agents.list()
            assert str(caught.value).count(str(backup)) == 1
        kept.replace(lost) if how != "emptied" else lost.write_bytes(content)


@pytest.mark.slow
def test_backups_under_load(
    sqlite_path: Path, tmp_path: Path, children: Children, record_property: RecordProperty
) -> None:
    """Fifty backups while four processes write: each is valid, complete and newer than the previous one."""
    told: dict[int, int] = {}
    ledgers = []
    with Database.open(sqlite_path, busy_timeout=timedelta(seconds=60)) as database:
        load.begin(database)
        writers = load.start(children, sqlite_path, told)
        while len(told) < load.WRITERS:
            time.sleep(0.01)
        for number in range(50):
            durable = dict(told)
            ledger, counts = load.look(database.backup(tmp_path / f"{number}.db"))
            # A backup contains each commit that a writer reported before the backup began.
            assert all(counts[writer] >= count for writer, count in durable.items())
            ledgers.append(ledger)
        for writer in writers:
            writer.stdin.write("\n")
            writer.stdin.flush()
        for writer in writers:
            writer.wait(60)
            assert writer.returncode == 0, writer.stderr.read() if writer.stderr else ""
        assert ledgers == sorted(ledgers)
        # The writers never stopped: between most backups the state has changed.
        assert len(set(ledgers)) > len(ledgers) // 2
        counts = load.look(database.backup(tmp_path / "last.db"))[1]
    deadline = time.monotonic() + 60
    while told != counts and time.monotonic() < deadline:
        time.sleep(0.01)  # the threads read the rest of the output
    assert told == counts
    record_property("backups under load, each of which was valid and complete", len(ledgers))


# The schedule


def test_schedule(sqlite_path: Path, clock: FakeClock, tmp_path: Path) -> None:
    """A backup is due when the newest is old enough by the database's clock, also after a restart; N are kept."""
    schedule = BackupSchedule(tmp_path / "backups", every=DAY, keep=2)

    def due(database: Database) -> bool:
        return back_up_if_due(database._settings, schedule) is not None

    with Database.open(sqlite_path, clock=clock) as database:
        assert due(database)
        assert not due(database)
        clock.advance(DAY - timedelta(milliseconds=1))
        assert not due(database)
    with Database.open(sqlite_path, clock=clock) as database:
        assert not due(database)
        clock.advance(milliseconds=1)
        assert due(database)
        # If the clock is set back, one more backup is made, not one after each sweep.
        clock.advance(-10 * DAY)
        assert [due(database) for _ in range(3)] == [True, False, False]
        clock.advance(DAY)
        assert due(database)
    assert len(list((tmp_path / "backups").glob("*.backup"))) == 2


def test_sweeper_makes_the_backups(sqlite_database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A sweeper with a schedule makes backups in the background; if one fails, it is logged and sweeps continue."""
    directory, blocked = tmp_path / "backups", tmp_path / "file"
    pause = threading.Event()
    with sqlite_database.sweeper(timedelta(milliseconds=1), backups=BackupSchedule(directory)):
        while not list(directory.glob("*.json")):
            pause.wait(0.01)
    assert len(list(directory.glob("*.backup"))) == 1
    blocked.write_text("")
    with sqlite_database.sweeper(timedelta(milliseconds=1), backups=BackupSchedule(blocked)) as sweeper:
        while "a scheduled backup failed" not in caplog.text:
            assert sweeper.running
            pause.wait(0.001)
    last_error = sqlite_database.counters().last_error
    assert last_error is not None
    assert str(blocked) in last_error.message
    path: Any = directory
    with pytest.raises(errors.InvalidArgumentError, match="backups must be a BackupSchedule"):
        sqlite_database.sweeper(backups=path)
    for wrong in ({"every": timedelta(0)}, {"keep": 0}):
        with pytest.raises(errors.InvalidArgumentError):
            BackupSchedule(directory, **wrong)
    places: list[Any] = [None, 1, "", b"backups", "two\nlines"]
    for place in places:
        with pytest.raises(errors.InvalidArgumentError):
            BackupSchedule(place)


def test_stopped_sweeper_ends_its_backup(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a sweeper is stopped, a running backup ends and no file is left."""
    directory = tmp_path / "backups"
    begun, go_on = threading.Event(), threading.Event()
    require_room = engine_backup.require_room

    def wait(*arguments: Any) -> None:
        begun.set()
        go_on.wait(30)
        require_room(*arguments)

    monkeypatch.setattr(engine_backup, "require_room", wait)
    sweeper = sqlite_database.sweeper(backups=BackupSchedule(directory))
    sweeper.start()
    assert begun.wait(30)
    sweeper._stop.set()
    go_on.set()
    sweeper.stop()
    assert names(directory) == set()


def test_one_process_makes_a_due_backup(sqlite_database: Database, tmp_path: Path) -> None:
    """If another process makes or has made the due backup, no second backup is made."""
    directory = tmp_path / "backups"
    directory.mkdir()

    def due() -> Path | None:
        return back_up_if_due(sqlite_database._settings, BackupSchedule(directory))

    with FileLock(directory / ".homeagent-backups.lock"):
        assert due() is None
    assert names(directory) == set()
    sqlite_database.backup(f"{directory}/")
    assert due() is None
    assert len(list(directory.glob("*.backup"))) == 1
