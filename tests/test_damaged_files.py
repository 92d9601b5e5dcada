"""Randomly damaged files: a database opens with correct rows or is refused, and a refused file keeps every byte.

Correct means: all rows that can be read are the original rows, or reading raises an error of homeagent. SQLite has no
checksums of pages, so a flipped byte inside a stored value is a different value: the test counts such values.

SQLite only: a server checks its own files.
"""

from __future__ import annotations

import gzip
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest
from sqlmodel import SQLModel, select

from homeagent import Agent, AgentSession, Database, Device, IdempotencyKey, Nonce, diagnose
from homeagent.engine.files import database_file
from homeagent.engine.sqlite import integrity
from homeagent.engine.sqlite.dialect import Connection, connect
from homeagent.errors import CorruptDatabaseError, DatabaseBusyError, ForeignDatabaseError, HomeAgentError
from homeagent.maintenance.doctor import Severity
from homeagent.migrations import VERSION_TABLE
from tests.conftest import Children, FakeClock, RecordProperty
from tests.test_other_users import hot_journal

MODELS: tuple[type[SQLModel], ...] = (Agent, Device, AgentSession, Nonce, IdempotencyKey)
SIDECARS = ("-wal", "-shm")

Rows = dict[str, dict[str, str]]
Files = dict[str, bytes]

# Fills a database in many units, moves a part from the WAL into the file, continues, and is killed.
FILL = """
import os, random, signal, sys
from datetime import UTC, datetime, timedelta
from homeagent import AgentCreate, AgentSessionCreate, Database, DeviceCreate, IdempotencyScope, Role
path, seed, end = sys.argv[1], int(sys.argv[2]), sys.argv[3]
chance = random.Random(seed)
now = datetime(2026, 1, 2, tzinfo=UTC)
database = Database.open(path, clock=lambda: now)
def fill(part, count):
    for number in range(count):
        name = f"{part}-{seed}-{number}"
        with database.unit_of_work() as unit:
            unit.devices.create(DeviceCreate(id=f"d-{name}", role=chance.choice(list(Role)),
                shared_secret_hash="sha256$" + chance.randbytes(32).hex(), metadata={"n": number}))
            unit.agents.create(AgentCreate(id=f"a-{name}", name=name, workspace_path=f"/srv/{name}",
                config={"text": "y" * chance.randrange(10, 3000)}))
            for each in range(3):
                unit.sessions.create(AgentSessionCreate(session_id=f"s-{name}-{each}", agent_id=f"a-{name}"))
                unit.nonces.consume(f"d-{name}", chance.randbytes(16).hex(), expires_at=now + timedelta(days=each + 1))
            unit.idempotency_keys.insert(IdempotencyScope(device_id=f"d-{name}", method="door.open", key=name),
                {"answer": chance.randrange(10**9)}, ttl=timedelta(days=1))
fill("moved", 12)
with database._engine.connect() as connection:
    connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(RESTART)")
fill("logged", 6)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
database.close()
"""


class Sample(NamedTuple):
    """A database as its process left it: the files by the suffix after the database's name, and all rows."""

    files: Files
    rows: Rows


def content(path: Path) -> Files:
    """Return all files by their suffix, except the "database in use" lock file `.open`."""
    return {
        each.name.removeprefix(path.name): each.read_bytes() for each in path.parent.iterdir() if each.suffix != ".open"
    }


def put(files: Files, path: Path) -> None:
    for suffix, content in files.items():
        each = path.with_name(path.name + suffix)
        each.write_bytes(content)
        each.chmod(0o600)


def read(path: Path, opened: Callable[[], None] = lambda: None) -> Rows:
    with Database.open(path, clock=FakeClock(), busy_timeout=timedelta(seconds=2)) as database:
        opened()
        rows: Rows = {}
        with database.unit_of_work(read_only=True) as unit:
            for model in MODELS:
                found = unit.session.exec(select(model)).all()
                rows[model.__name__] = {
                    repr(list(model.__mapper__.primary_key_from_instance(row))): repr(row.model_dump())  # type: ignore[attr-defined]  # it is a table
                    for row in found
                }
            # Read the same rows through the stores, whose statements use the indexes.
            devices = {device.id for device in unit.devices.list(limit=1000)}
            agents = {agent.id for agent in unit.agents.list(limit=1000)}
            sessions = {session.session_id for session in unit.sessions.list(limit=1000)}
        for name, ids in (("Device", devices), ("Agent", agents), ("AgentSession", sessions)):
            assert {repr([each]) for each in ids} == set(rows[name]), f"{name}: the index and the table disagree"
        return rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a database in a private directory."""
    (tmp_path / "private").mkdir(mode=0o700)
    return tmp_path / "private" / "homeagent.db"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    """A database that was closed, a database whose process was killed, and another database of a killed process."""
    children = Children()
    made: dict[str, Sample] = {}
    try:
        for name, seed, end in (("closed", 1, "closed"), ("killed", 1, "killed"), ("other", 2, "killed")):
            directory = tmp_path_factory.mktemp(name) / "private"
            process = children.start(FILL, directory / "homeagent.db", seed, end)
            process.communicate(timeout=60)
            assert process.returncode == (0 if end == "closed" else -9)
            files = content(directory / "homeagent.db")
            assert set(files) == {"", ".lock", *(SIDECARS if end == "killed" else ())}
            made[name] = Sample(files, read(directory / "homeagent.db"))
        assert made["closed"].rows == made["killed"].rows
    finally:
        children.close()
    return made


def flip(content: bytearray, chance: random.Random) -> bytearray:
    """Change some bits at random places."""
    for _ in range(chance.choice([1, 1, 2, 8])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def zero(content: bytearray, chance: random.Random) -> bytearray:
    """Fill some pages with zeros, as a disk or a file system does after losing the pages."""
    for _ in range(chance.choice([1, 1, 3])):
        start = chance.randrange(max(len(content) // 4096, 1)) * 4096
        end = min(start + 4096, len(content))
        content[start:end] = bytes(end - start)
    return content


def cut(content: bytearray, chance: random.Random) -> bytearray:
    """Truncate a file, at a page boundary or elsewhere."""
    length = chance.randrange(len(content))
    return content[: length - length % 4096 if chance.random() < 0.5 else length]


def header(content: bytearray, chance: random.Random) -> bytearray:
    """Overwrite the first bytes with other bytes."""
    size = chance.choice([1, 16, 32, 100])
    return bytearray(chance.randbytes(size)) + content[size:]


def lose(content: bytearray, chance: random.Random) -> None:
    """Remove a file."""


def one_file(
    files: Files, chance: random.Random, change: Callable[[bytearray, random.Random], bytearray | None]
) -> str:
    """Change or remove one of the files."""
    suitable = ("", "-wal") if change is zero or change is header else ("", *SIDECARS)
    which = chance.choice([name for name in files if name in suitable])
    changed = change(bytearray(files[which]), chance)
    if changed is None:
        del files[which]
    else:
        files[which] = bytes(changed)
    return f"{change.__name__} {which or 'db'}"


def foreign(files: Files, chance: random.Random, samples: dict[str, Sample]) -> str:
    """Replace the database with a file that is not a homeagent database, and keep the files next to the database."""
    with closing(sqlite3.connect(":memory:")) as raw:
        raw.executescript("CREATE TABLE devices (id TEXT PRIMARY KEY); INSERT INTO devices VALUES ('theirs')")
        contents = {
            "sqlite": raw.serialize(),
            "text": b"# settings\n" * 200,
            "noise": chance.randbytes(20_000),
            "zeros": bytes(len(files[""])),
            "gzip": gzip.compress(b"x" * 100_000 + chance.randbytes(2000)),
            "our own backup, packed": gzip.compress(samples["closed"].files[""], 1),
        }
    kind = chance.choice(list(contents))
    files[""] = contents[kind]
    return f"foreign {kind}"


def stale(files: Files, chance: random.Random, samples: dict[str, Sample]) -> str:
    """Put another database's WAL, WAL index or both next to the database."""
    taken = chance.choice([("-wal",), ("-wal", "-shm"), ("-shm",)])
    if "-wal" in taken:
        for name in SIDECARS:
            files.pop(name, None)
    files.update({name: samples["other"].files[name] for name in taken})
    return f"stale {'+'.join(taken)}"


DAMAGES: tuple[Callable[..., Any], ...] = (
    flip, flip, flip, zero, zero, cut, cut, header, foreign, stale, stale, lose,
)  # fmt: skip


def judge(path: Path, sample: Sample, damaged: Files) -> str:
    """Open a damaged database and return the outcome; fail if a row is wrong or a byte of a refused file changed."""
    put(damaged, path)
    before = content(path)
    opened: list[bool] = []
    try:
        rows = read(path, lambda: opened.append(True))
    except (CorruptDatabaseError, ForeignDatabaseError) as error:
        if opened:
            return "told where it was met"
        outcome = f"refused: {type(error).__name__}"
    except HomeAgentError as error:
        raise AssertionError(f"an error that does not say what is wrong: {error!r}") from error
    else:
        if rows == sample.rows:
            return "right"
        missing = {name: set(sample.rows[name]) - set(rows[name]) for name in rows}
        added = {name: set(rows[name]) - set(sample.rows[name]) for name in rows}
        changed = sum(
            rows[name][key] != sample.rows[name][key] for name in rows for key in rows[name].keys() & sample.rows[name]
        )
        lost = sum(map(len, missing.values()))
        assert lost == sum(map(len, added.values())), f"rows came or went: {missing} {added}"
        return f"another value ({changed + lost})"
    assert content(path) == before, "what was refused was changed"
    return outcome


def attempt(number: int, tmp_path: Path, samples: dict[str, Sample]) -> str:
    """Damage a database in the way of this number, and return the kind of damage and the outcome."""
    chance = random.Random(number)
    sample = samples[chance.choice(["closed", "killed", "killed"])]
    damaged = dict(sample.files)
    damage = DAMAGES[number % len(DAMAGES)]
    what = damage(damaged, chance, samples) if damage in (foreign, stale) else one_file(damaged, chance, damage)
    directory = tmp_path / str(number)
    directory.mkdir(mode=0o700)
    try:
        return f"{what}: {judge(directory / 'homeagent.db', sample, damaged)}"
    except AssertionError as error:
        raise AssertionError(f"damage {number}, {what}: {error}") from error
    finally:
        shutil.rmtree(directory)


def attempts(numbers: range, tmp_path: Path, samples: dict[str, Sample]) -> Counter[str]:
    return Counter(attempt(number, tmp_path, samples) for number in numbers)


def test_damaged_files(tmp_path: Path, samples: dict[str, Sample]) -> None:
    """Of thirty damaged files, opening reads no wrong row beyond a flipped value and changes no refused file."""
    found = attempts(range(30), tmp_path, samples)
    assert {end.partition(": ")[2].partition(" ")[0] for end in found} >= {"right", "refused:"}, found


@pytest.mark.slow
def test_530_damaged_files(tmp_path: Path, samples: dict[str, Sample], record_property: RecordProperty) -> None:
    """Of 530 damaged files, only bytes that were flipped in the database file give wrong values."""
    found = attempts(range(30, 560), tmp_path, samples)
    print("\n".join(f"{count:4} {end}" for end, count in sorted(found.items())))  # noqa: T201  shown with -s
    assert sum(found.values()) == 530
    record_property("damaged, truncated or foreign files opened", 530)
    assert {end.partition(":")[0] for end in found if "another value" in end} <= {"flip db"}


# Keeps a copy of the WAL index, restarts the WAL after the copy, and is killed.
RESTART = """
import os, shutil, signal, sys
from homeagent import AgentCreate, Database
path, restarts = sys.argv[1], int(sys.argv[2])
database = Database.open(path)
def add(name):
    database.run(lambda unit: unit.agents.create(AgentCreate(id=name, name=name, workspace_path="/srv")))
add("first")
shutil.copyfile(f"{path}-shm", f"{path}.index")
shutil.copyfile(f"{path}-wal", f"{path}.log")
for number in range(restarts):
    with database._engine.connect() as connection:
        connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(RESTART)")
    add(f"later-{number}")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=[1, 3])
def restarted(request: pytest.FixtureRequest, path: Path, children: Children) -> Path:
    """A killed database whose WAL restarted once or more often; `.index` and `.log` are from before the restart."""
    assert children.start(RESTART, path, request.param).wait(timeout=60) == -9
    return path


def test_power_cut_leaves_an_older_index(restarted: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a power cut, an index from before the WAL's last restart is no sign of loss, and the database opens."""
    Path(f"{restarted}-shm").write_bytes(Path(f"{restarted}.index").read_bytes())
    agents = read(restarted)["Agent"]
    assert {"['first']", "['later-0']"} <= set(agents)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("suffix", "words"),
    [(".log", "not of one database and time"), ("", "can't be read as one")],
    ids=["older", "empty"],
)
def test_a_wal_that_lost_commits_is_refused(restarted: Path, suffix: str, words: str) -> None:
    """If the WAL is from before its last restart or is empty, but the index is current, opening refuses."""
    older = Path(f"{restarted}{suffix}").read_bytes() if suffix else b""
    Path(f"{restarted}-wal").write_bytes(older)
    with pytest.raises(CorruptDatabaseError, match=words):
        read(restarted)


# Leaves 3 MiB in the WAL alone, and is killed.
LARGE = """
import os, signal, sys
from homeagent import AgentCreate, Database
database = Database.open(sys.argv[1])
with database.unit_of_work(read_only=True) as reader:
    reader.agents.list()  # keeps the log from being moved into the file
    with database.unit_of_work() as unit:
        for number in range(3000):
            unit.agents.create(AgentCreate(id=f"a{number}", name="x" * 200, workspace_path="/srv/" + "y" * 800))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_large_wal_is_checked_once(path: Path, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill, opening checks the content once, with the check that suits the size of file and WAL."""
    assert children.start(LARGE, path).wait(timeout=60) == -9
    assert path.stat().st_size < 2 * 1024 * 1024 < Path(f"{path}-wal").stat().st_size
    checks: list[str] = []

    def note(operation: int, name: str | None, *_: str | None) -> int:
        if operation == apsw.SQLITE_PRAGMA and name in ("quick_check", "integrity_check"):
            checks.append(name)
        return apsw.SQLITE_OK

    monkeypatch.setattr(apsw, "connection_hooks", [lambda connection: setattr(connection, "authorizer", note)])
    with Database.open(path, clock=FakeClock()):
        pass
    assert checks == ["quick_check"]


def test_check_of_a_wal_writes_no_file(path: Path, samples: dict[str, Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check after a kill writes no file, neither next to the database nor in a directory for temporary files."""
    put(samples["killed"].files, path)
    monkeypatch.setattr(tempfile, "tempdir", str(path / "absent"))

    def check(path: Path, raw: Connection, *, always: bool = False) -> None:
        assert raw.execute("SELECT count(*) FROM agents").get == len(samples["killed"].rows["Agent"])
        assert content(path) == samples["killed"].files

    monkeypatch.setattr(integrity, "check_content", check)
    with Database.open(path, clock=FakeClock()):
        pass


def test_damage_without_locks_is_confirmed_with_locks(
    path: Path, samples: dict[str, Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another program writes during the check without locks, the file looks damaged, and a second check opens it."""
    put(samples["killed"].files, path)
    locks: list[str] = []

    def check(path: Path, raw: Connection, *, always: bool = False) -> None:
        locks.append(raw.pragma("locking_mode"))
        if locks == ["exclusive"]:
            raise CorruptDatabaseError("another program has written")

    monkeypatch.setattr(integrity, "check_content", check)
    assert read(path) == samples["killed"].rows
    assert locks == ["exclusive", "normal"]


def test_no_process_skips_the_check_of_another_process(
    path: Path, samples: dict[str, Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a process opens a file whose WAL lost commits, a second process waits, and does not open the file."""
    put({**samples["killed"].files, "-wal": b"", ".open": b""}, path)
    secure = database_file.secure_sidecars

    def open_again(path: Path) -> list[Path]:
        monkeypatch.setattr(database_file, "secure_sidecars", secure)
        with pytest.raises(DatabaseBusyError):
            Database.open(path, clock=FakeClock(), busy_timeout=timedelta(0))
        return secure(path)

    monkeypatch.setattr(database_file, "secure_sidecars", open_again)
    with pytest.raises(CorruptDatabaseError, match="not closed cleanly"):
        read(path)


# WALs that SQLite itself leaves behind after a kill or a power cut, and ignores: by name, the remaining bytes.
SCRAPS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda log: b"",
    "one byte": lambda log: log[:1],
    "part of a header": lambda log: log[:31],
    "header": lambda log: log[:32],
    "damaged header": lambda log: log[:24] + bytes(8),
    "another magic number": lambda log: b"\1\2\3\4" + log[4:32],
    "damaged header and part of a frame": lambda log: log[:24] + bytes(8) + log[32:500],
    "part of a frame": lambda log: log[: 32 + 24 + 2000],
    "zeros": lambda log: bytes(len(log)),
}
INDEXES: dict[str, bytes | None] = {"none": None, "zeros": bytes(32768)}


def judged(path: Path, files: Files) -> dict[str, Severity]:
    """Write a database's files and return the severity that each check of the doctor reports."""
    put(files, path)
    diagnosis = diagnose(path, clock=FakeClock())
    assert not diagnosis.not_checked
    return {finding.check: finding.severity for finding in diagnosis.findings}


@pytest.fixture(scope="module")
def expected(samples: dict[str, Sample], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Severity]:
    """The severities that the doctor reports for a closed database."""
    directory = tmp_path_factory.mktemp("closed") / "private"
    directory.mkdir(mode=0o700)
    return judged(directory / "homeagent.db", {**samples["closed"].files, ".open": b""})


@pytest.mark.parametrize("index", ["none", pytest.param("zeros", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scrap", SCRAPS)
def test_a_wal_without_frames_counts_as_absent(
    path: Path, tmp_path: Path, samples: dict[str, Sample], expected: dict[str, Severity], scrap: str, index: str
) -> None:
    """If a WAL has no valid frame, the doctor, an opening and a restore of the file treat the WAL as absent."""
    sample = samples["closed"]
    files = {**sample.files, ".open": b"", "-wal": SCRAPS[scrap](samples["killed"].files["-wal"])}
    if (content_of_index := INDEXES[index]) is not None:
        files["-shm"] = content_of_index
    restored = tmp_path / "restored" / "homeagent.db"
    assert judged(path, files) == expected
    Database.restore(path, restored)
    assert read(restored) == sample.rows
    assert read(path) == sample.rows


def test_a_rollback_journal_next_to_a_wal(path: Path, samples: dict[str, Sample]) -> None:
    """Opening rolls a hot journal back if the WAL has no frames, and otherwise asks to move the journal away."""
    whole, killed = samples["closed"].files, samples["killed"]
    journal = path.with_name("homeagent.db-journal")
    put({**whole, "": whole[""][:-4096] + bytes(4096), "-wal": killed.files["-wal"][:32], ".open": b""}, path)
    put({"-journal": hot_journal(whole[""])}, path)
    assert read(path) == killed.rows
    assert not journal.exists()

    put({**killed.files, "-journal": hot_journal(whole[""])}, path)
    with pytest.raises(CorruptDatabaseError, match="move the journal to another directory"):
        read(path)
    journal.unlink()
    assert read(path) == killed.rows


@pytest.mark.parametrize("database", [b"", None], ids=["empty", "missing"])
def test_the_doctor_keeps_the_wal_of_a_lost_database(
    path: Path, samples: dict[str, Sample], database: bytes | None
) -> None:
    """If a database was emptied or deleted, the doctor reports the loss, and keeps the WAL with the last commits."""
    files = {**samples["killed"].files, "": database, ".open": b""}
    found = {suffix: content for suffix, content in files.items() if content is not None}
    put(found, path)
    assert diagnose(path).severity is Severity.CRITICAL
    assert content(path) == {suffix: found[suffix] for suffix in found if suffix != ".open"}


@pytest.mark.parametrize("index", ["live", *INDEXES])
@pytest.mark.parametrize("rest", [b"", b"\1" * 2000, bytes(9000)], ids=["half", "noise", "zeros"])
def test_a_commit_that_was_cut_off(
    path: Path, samples: dict[str, Sample], expected: dict[str, Severity], index: str, rest: bytes
) -> None:
    """If a commit was cut off, opening ignores the frames after the last commit and keeps every commit before."""
    files = {**samples["killed"].files, ".open": b""}
    log = files["-wal"]
    files["-wal"] = log + (rest or log[32:2000])
    indexes = {**INDEXES, "live": files.pop("-shm")}
    if (content_of_index := indexes[index]) is not None:
        files["-shm"] = content_of_index
    assert judged(path, files) == expected
    assert read(path) == samples["killed"].rows


@pytest.mark.parametrize("begin", [0, 4096], ids=["header", "page"])
def test_a_damaged_file_next_to_a_wal_header(path: Path, samples: dict[str, Sample], begin: int) -> None:
    """If the database file is damaged, the error reports the damage, whatever remains of WAL and WAL index."""
    killed, database = samples["killed"].files, bytearray(samples["closed"].files[""])
    database[begin : begin + 100] = b"\1" * 100
    put({"": bytes(database), ".lock": killed[".lock"], "-wal": killed["-wal"][:32], "-shm": bytes(32768)}, path)
    assert diagnose(path).severity is Severity.CRITICAL
    with pytest.raises(CorruptDatabaseError):
        read(path)


# Texts in the file that are no longer UTF-8 if their third byte is 0xAC.
TEXTS = (
    b"CREATE TABLE devices",
    b"tabledevices",
    b"homeagent_schema_version",
    b"CREATE INDEX",
    b"idx_idempotency_lease",
)


@pytest.mark.parametrize("text", TEXTS)
def test_undecodable_schema(path: Path, tmp_path: Path, samples: dict[str, Sample], text: bytes) -> None:
    """If a text of the schema has an undecodable byte, opening, doctor, copy and restore report damage."""
    files = dict(samples["closed"].files)
    at = files[""].index(text) + 2
    files[""] = files[""][:at] + b"\xac" + files[""][at + 1 :]
    put(files, path)
    before = content(path)
    assert diagnose(path).severity is Severity.CRITICAL
    for migrate in (True, False):
        with pytest.raises(CorruptDatabaseError):
            Database.open(path, migrate=migrate)
    with pytest.raises(CorruptDatabaseError):
        Database.restore(path, tmp_path / "restored.db")
    assert content(path) == before


SECRET = "sha256$do-not-tell"


@pytest.fixture
def undecodable(path: Path) -> Path:
    """A database in which another program wrote a device and an agent whose texts are not UTF-8."""
    Database.open(path).close()
    with closing(connect(str(path))) as raw, raw:
        raw.execute(
            "INSERT INTO devices (id, role, shared_secret_hash, paired_at) VALUES ('d', 'node', CAST(? AS TEXT), 0)",
            [SECRET.encode() + b"\xac"],
        )
    return path


def told_by(error: BaseException | None) -> str:
    """Return all that a traceback of this error would show, with the attributes of its exceptions."""
    return "" if error is None else f"{error!r} {error} {vars(error)} {told_by(error.__context__)}"


def test_undecodable_rows(undecodable: Path, tmp_path: Path) -> None:
    """If a text of a row can't be decoded, reading the row raises CorruptDatabaseError without the text."""
    with Database.open(undecodable) as database, Database.open(tmp_path / "copy.db") as copy:
        acts: list[Callable[[], object]] = [
            lambda: database.run(lambda unit: unit.session.exec(select(Device)).all(), read_only=True),
            lambda: database.run(lambda unit: unit.devices.list(), read_only=True),
            lambda: database.copy_to(copy),
        ]
        for act in acts:
            with pytest.raises(CorruptDatabaseError, match="not UTF-8") as refusal:
                act()
            assert SECRET not in told_by(refusal.value)
        assert database.status().rows["devices"] == 1
    with pytest.raises(CorruptDatabaseError, match="can't read it") as refusal:
        Database.restore(undecodable, tmp_path / "restored.db")
    assert SECRET not in told_by(refusal.value)


def test_undecodable_revision(undecodable: Path, tmp_path: Path) -> None:
    """If the revision can't be decoded, backup, `status`, the doctor and the next opening report damage."""
    with Database.open(undecodable) as database:
        with closing(connect(str(undecodable))) as raw, raw:
            raw.execute(f"UPDATE {VERSION_TABLE} SET version_num = CAST(x'30ac' AS TEXT)")
        for act in (database.status, lambda: database.backup(tmp_path / "backup.db")):
            with pytest.raises(CorruptDatabaseError):
                act()
        assert database.doctor().severity is Severity.CRITICAL
    with pytest.raises(CorruptDatabaseError):
        Database.open(undecodable)
