"""Opening a database: the choice of the file, the refusals that change no file, and the privacy of the files."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import URL, MetaData

from homeagent import AgentCreate, Database, diagnose, errors
from homeagent.cli import main
from homeagent.engine.sqlite.engine import APPLICATION_ID
from homeagent.maintenance import BackupSchedule
from homeagent.maintenance.doctor import Severity
from homeagent.migrations import REVISION, VERSION_TABLE
from tests.conftest import add_agent
from tests.engine.files.conftest import needs_root, snapshot
from tests.migrations.old_databases import sqlite

if TYPE_CHECKING:
    from tests.conftest import Children

FIXTURES = Path(__file__).parent / "fixtures" / "revisions"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir(0o700)
    return made


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "homeagent.db"


def location(database: Database) -> Path:
    return Path(database.status().location)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory of the user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def test_default_path_and_environment_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument precedes $HOMEAGENT_DATABASE, and without both the database is ~/.homeagent/homeagent.db."""
    for value, target, expected in (
        (None, None, home / ".homeagent" / "homeagent.db"),
        ("", None, home / ".homeagent" / "homeagent.db"),
        ("~/named/by variable.db", None, home / "named" / "by variable.db"),
        ("~/named/by variable.db", home / "argument.db", home / "argument.db"),
    ):
        monkeypatch.delenv("HOMEAGENT_DATABASE", raising=False)
        if value is not None:
            monkeypatch.setenv("HOMEAGENT_DATABASE", value)
        with Database.open(target) as database:
            assert location(database) == expected
        assert expected.stat().st_size


@pytest.mark.parametrize(
    "spell",
    [
        lambda path: path,
        str,
        lambda path: f"sqlite:///{path}",
        lambda path: URL.create("sqlite", database=str(path)),
        lambda path: f"~/{path.relative_to(Path.home())}",
        lambda path: path.relative_to(Path.cwd()),
        lambda path: f"sqlite:///{path.relative_to(Path.cwd())}",
    ],
    ids=["path", "text", "url", "URL", "home", "relative", "relative-url"],
)
def test_every_spelling_is_one_file(home: Path, monkeypatch: pytest.MonkeyPatch, spell: Callable[[Path], Any]) -> None:
    """All spellings of a path lead to the same file: absolute, relative, with `~`, and in a URL."""
    home.chmod(0o700)
    monkeypatch.chdir(home)
    path = home / "é 100%#.db"
    initialised(path)
    with Database.open(spell(path)) as database:
        assert [agent.id for agent in database.agents.list()] == ["a"]


@pytest.mark.parametrize("target", [":memory:", "sqlite://", "sqlite:///:memory:"])
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """`:memory:` is a single database for all threads, private to its opener, and deleted at the close."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Database.open(target, migrate=False) as one, Database.open(target) as other:
        with one.unit_of_work() as unit:
            unit.agents.create(AgentCreate(id="a", name="A", workspace_path="/a"))
        with other.unit_of_work() as unit:
            assert unit.agents.find_by_id("a") is None
        with one.unit_of_work(read_only=True) as unit:
            assert unit.agents.find_by_id("a") is not None
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_memory_without_a_directory_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no usual directory for temporary files can be written, as in some containers, the error names the remedy."""
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
        with pytest.raises(errors.DatabaseError, match="set TMPDIR"):
            Database.open(":memory:")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(errors.DatabaseError, match=r"make a temporary directory in .*absent"):
        Database.open(":memory:")


@pytest.mark.parametrize("value", [None, 5, "audit_devices", MetaData(), [None]], ids=repr)
@pytest.mark.parametrize("option", ["metadata", "acknowledged", "clock"])
def test_an_invalid_option(tmp_path: Path, option: str, value: Any) -> None:
    """An argument that is not a clock or a collection of the right objects is refused before a directory is made."""
    with pytest.raises(errors.InvalidArgumentError, match=f"{option} must be"):
        Database.open(tmp_path / "new" / "homeagent.db", **{option: value})
    assert not (tmp_path / "new").exists()


INVALID: dict[str | None, list[Any]] = {
    None: ["", "a\0b", "mysql://localhost/x", "sqlite:///x.db?mode=ro", "nonsense://", 5, b"x.db", ["x.db"]],
    "names a directory: name a file in it": ["data/", "sqlite:///data/"],
    "use a path, sqlite:/// or postgresql://": ["postgres://u:hidden@127.0.0.1/x"],
    "a control character, such as a line break: remove": [
        *(Path("home.db\n"), Path("a\tb.db"), Path("home\x85.db"), URL.create("sqlite", database="home.db\r"))
    ],
    r"SQLite URI.*read_only=True": [
        *("file:home.db?mode=ro", "FILE:home.db", "sqlite:///file:home.db", "file:///home.db")
    ],
}


@pytest.mark.parametrize("remedy", INVALID)
def test_invalid_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remedy: str | None) -> None:
    """If a target names no database, each entry point names the remedy and no password, and creates no file."""
    monkeypatch.chdir(tmp_path)
    for target in INVALID[remedy]:
        for open_or_look in (Database.open, Database.begin_epoch, diagnose):
            with pytest.raises(errors.InvalidArgumentError, match=remedy) as caught:
                open_or_look(target)
            assert "hidden" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


ADDRESSES = [
    "host=db dbname=home user=gateway password=S3CRET", "password = 'S3CRET'", "PGPASSWORD=x host=db\tpassword=S3CRET",
    "postgresql:/gateway:S3CRET@db/home", "postgresql+psycopg:/gateway:S3CRET@db/home", "postgresql:gateway:S3CRET@db",
    "postgres//gateway:S3CRET@db/home", "postgresql+psycopg//db/home", "//gateway:S3CRET@db/home",
    " postgresql:/gateway:S3CRET@db/home", "jdbc:postgresql://gateway:S3CRET@db/home",
    "'postgresql://gateway:S3CRET@db/home'", "postgresql://gateway:S3CRET@db:port/home",
    "postgresql://gateway:S3CRET@db/home\n", "postgresql://gateway:S3CRET@db/home\0",
    "sqlite://gateway:S3CRET@db/home.db", "gateway:S3CRET@db/home", "gateway:S3/CRET@db/home", "gateway@db/home",
    "db:5432/home", "[::1]:5432/home", "sqlite:home.db", "sqlite:/home.db", "sqlite://home.db", "file:home.db?mode=ro",
    "home.db\n",
]  # fmt: skip


@pytest.mark.parametrize("target", ADDRESSES, ids=repr)
def test_mistyped_address_makes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a server's address is not a URL, each entry point refuses it without a file and without showing it."""
    monkeypatch.chdir(tmp_path)
    messages = []
    for open_or_look in (Database.open, Database.begin_epoch, diagnose):
        with pytest.raises(errors.InvalidArgumentError) as caught:
            open_or_look(target)
        messages.append(str(caught.value))
    if "\0" not in target:
        monkeypatch.setenv("HOMEAGENT_DATABASE", target)
        with pytest.raises(errors.InvalidArgumentError) as caught:
            Database.open()
        messages.append(str(caught.value))
    for arguments in (["status", "--database", target], ["init", "--database", target], ["copy", target, "new.db"]):
        with pytest.raises(SystemExit) as ended:
            monkeypatch.setattr(sys, "argv", ["homeagent", *arguments])
            main()
        assert ended.value.code == 1
    messages += capsys.readouterr()
    assert not any("CRET" in message for message in messages)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ADDRESSES[:12], ids=repr)
def test_address_is_not_a_backup_path(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """If a backup's path is a server's address, the backup creates no directory and does not show the address."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for call in (
        lambda: sqlite_database.backup(path),
        lambda: Database.restore(path, "restored.db"),
        lambda: BackupSchedule(path),
    ):
        with pytest.raises(errors.InvalidArgumentError) as caught:
            call()
        assert "S3CRET" not in str(caught.value)
    assert list(Path.cwd().iterdir()) == []


RESEMBLING: dict[str | Path, str] = {
    "./a:b.db": "a:b.db",
    "../here/a:b.db": "a:b.db",
    "~/a:b.db": "a:b.db",
    "here/a:b.db": "here/a:b.db",
    "{directory}/host=x user=y.db": "host=x user=y.db",
    "sqlite:///a:b.db": "a:b.db",
    "anna@home.db": "anna@home.db",
    "postgres/host.db": "postgres/host.db",
    Path("host=db password=x"): "host=db password=x",
    Path("postgresql:/gateway:x@db/home"): "postgresql:/gateway:x@db/home",
    "./file:home.db": "file:home.db",
    "{directory}/link/homeagent.db": "link/homeagent.db",
}


def test_path_that_resembles_an_address(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a path only resembles an address (a PathLike, a late colon or `@`) or has a linked directory, it is opened."""
    here = home / "here"
    (here / "real").mkdir(mode=0o700, parents=True)
    (here / "link").symlink_to("real", target_is_directory=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    for target, name in RESEMBLING.items():
        (here / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours(here / name)
        with Database.open(target.format(directory=here) if isinstance(target, str) else target) as database:
            assert location(database) == (here / name).resolve()


@pytest.mark.parametrize("path", [None, 5, b"x.db"], ids=repr)
def test_invalid_paths(sqlite_database: Database, tmp_path: Path, path: Any) -> None:
    """If the argument is not a path, making and restoring a backup refuse the argument."""
    with pytest.raises(errors.InvalidArgumentError, match="path"):
        sqlite_database.backup(path)
    with pytest.raises(errors.InvalidArgumentError, match="path"):
        Database.restore(path, tmp_path / "restored.db")


def foreign(path: Path, *, wal: bool) -> None:
    """Create another application's database, with its WAL if the database is in WAL mode."""
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("CREATE TABLE devices (id TEXT PRIMARY KEY)")
        raw.execute(f"CREATE TABLE {VERSION_TABLE} (version_num TEXT)")
        raw.execute("INSERT INTO devices VALUES ('theirs')")
        if wal:
            raw.execute("PRAGMA journal_mode=WAL")
            raw.execute("INSERT INTO devices VALUES ('in the log')")
            # A closing connection would empty the WAL: keep the files as a crash leaves them.
            for name in ("", "-wal"):
                shutil.copyfile(f"{path}{name}", f"{path}{name}.kept")
    if wal:
        for name in ("", "-wal"):
            Path(f"{path}{name}.kept").replace(f"{path}{name}")


def ours(path: Path, revision: str = REVISION) -> None:
    shutil.copyfile(FIXTURES / f"{revision}.db", path)
    path.chmod(0o600)


def from_the_future(path: Path) -> None:
    ours(path)
    with closing(sqlite(path)) as raw:
        raw.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
        raw.execute("UPDATE store SET oldest_revision = '9998'")


def two_versions(path: Path) -> None:
    """Create a database that claims two revisions."""
    ours(path)
    with closing(sqlite(path)) as raw:
        raw.execute(f"INSERT INTO {VERSION_TABLE} VALUES ('0003')")


def cut(path: Path, size: int) -> None:
    """Create a database, and truncate it to a number of bytes."""
    ours(path)
    os.truncate(path, size)


def linked(path: Path) -> None:
    ours(path.with_name("real.db"))
    path.symlink_to("real.db")


def linked_twice(path: Path) -> None:
    """Give a database a second name."""
    ours(path)
    path.with_name("second.db").hardlink_to(path)


REFUSED: dict[str, tuple[Callable[[Path], object], type[errors.DatabaseError], str]] = {
    "foreign": (lambda path: foreign(path, wal=False), errors.ForeignDatabaseError, "another application"),
    "foreign, with a log": (lambda path: foreign(path, wal=True), errors.ForeignDatabaseError, "another application"),
    "newer": (from_the_future, errors.SchemaTooNewError, "upgrade homeagent"),
    "two versions": (two_versions, errors.CorruptDatabaseError, "restore"),
    "text": (
        lambda path: path.write_text("dear diary, " * 100),
        errors.CorruptDatabaseError,
        r"is not a SQLite database: check the path.*homeagent\.db",
    ),
    "1 byte": (lambda path: path.write_bytes(b"S"), errors.CorruptDatabaseError, "1 bytes"),
    "a blank": (lambda path: path.write_bytes(b"\n"), errors.CorruptDatabaseError, "backup"),
    "100 bytes": (lambda path: cut(path, 100), errors.CorruptDatabaseError, "100 bytes"),
    "511 bytes": (lambda path: cut(path, 511), errors.CorruptDatabaseError, "511 bytes"),
    "512 bytes": (lambda path: cut(path, 512), errors.CorruptDatabaseError, "backup"),
    "one page": (lambda path: cut(path, 4096), errors.CorruptDatabaseError, "backup"),
    "all but a page": (lambda path: cut(path, 86016), errors.CorruptDatabaseError, "backup"),
    "zeros": (lambda path: path.write_bytes(bytes(8192)), errors.CorruptDatabaseError, "backup"),
    "directory": (lambda path: path.mkdir(), errors.ForeignDatabaseError, "a directory"),
    "symbolic link": (linked, errors.InsecureFileError, "symbolic link"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), errors.InsecureFileError, "symbolic link"),
    "hard link": (linked_twice, errors.InsecureFileError, "2 names"),
    "pipe": (lambda path: os.mkfifo(path), errors.ForeignDatabaseError, "pipe"),
}


@pytest.mark.parametrize("migrate", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_files_stay_unchanged(directory: Path, path: Path, kind: str, migrate: bool) -> None:
    """If opening refuses a file, the error has a specific class, and no byte, mode, time or name changes."""
    make, error, says = REFUSED[kind]
    make(path)
    if path.is_file() and not path.is_symlink():
        path.chmod(0o600)
    before = snapshot(directory)
    with pytest.raises(error, match=says) as caught:
        Database.open(path, migrate=migrate)
    assert type(caught.value) is error
    assert snapshot(directory) == before


@pytest.mark.parametrize("revision", ["0001", "0003"])
def test_migrate_false_keeps_an_outdated_schema(directory: Path, path: Path, revision: str) -> None:
    """With migrate=False an older schema is refused by name and stays unchanged."""
    ours(path, revision)
    before = snapshot(directory)
    with pytest.raises(errors.SchemaOutdatedError) as caught:
        Database.open(path, migrate=False)
    assert (caught.value.revision, caught.value.needed) == (revision, REVISION)
    assert snapshot(directory) == before


def test_absent_database_is_named(tmp_path: Path) -> None:
    """Without a database, migrate=False and `begin_epoch` name the path, and create neither a file nor a directory."""
    path = tmp_path / "absent" / "homeagent.db"
    for open_or_begin in (lambda: Database.open(path, migrate=False), lambda: Database.begin_epoch(path)):
        with pytest.raises(errors.SchemaOutdatedError, match=r"there is no database yet at .*check the name") as caught:
            open_or_begin()
        assert (caught.value.revision, caught.value.location) == (None, str(path))
        assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(errors.InvalidArgumentError):
        Database.begin_epoch(":memory:")


DENIED = """
import json, os, sys
from homeagent import Database, errors

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    Database.open(sys.argv[1])
except errors.HomeAgentError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("mode", "name", "error"),
    [
        (0o000, "homeagent.db", "DatabaseError no permission to inspect .*homeagent.db.*run as the owner"),
        (0o000, "sub/homeagent.db", "DatabaseError no permission to make the directory .*sub.*run as the owner"),
        (0o500, "new.db", "DatabaseError no permission to .*new.db.*run as the owner"),
        (0o500, "sub/homeagent.db", "DatabaseError no permission to make the directory .*sub.*run as the owner"),
        pytest.param(0o755, "homeagent.db", "InsecureFileError .*belongs to user 0", marks=needs_root),
    ],
)
def test_missing_permission(children: Children, public_directory: Path, mode: int, name: str, error: str) -> None:
    """If the user lacks permission for the directory or the file, the error names the reason, and no file changes."""
    inner = public_directory / "data"
    inner.mkdir()
    ours(inner / "homeagent.db")
    before = snapshot(inner)
    inner.chmod(mode)
    assert re.match(error, children.run(DENIED, inner / name))
    inner.chmod(0o700)
    assert snapshot(inner) == before


def initialised(path: Path) -> None:
    with Database.open(path) as database:
        add_agent(database, "a")


def lose_schema(path: Path) -> None:
    """Drop all tables, as a faulty program may."""
    with closing(sqlite(path)) as raw:
        raw.execute("PRAGMA foreign_keys=OFF")
        tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
        for (table,) in raw.execute(tables).fetchall():
            raw.execute(f"DROP TABLE {table}")


def replace_by_empty(path: Path) -> None:
    path.unlink()
    path.touch(0o600)


LOST: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: os.truncate(path, 0),
    "replaced by an empty one": replace_by_empty,
    "without tables": lose_schema,
}


@pytest.mark.parametrize(
    ("kind", "revision"), [*((kind, None) for kind in LOST), ("removed", "0001"), ("removed", REVISION)]
)
def test_lost_database_is_not_recreated(directory: Path, path: Path, kind: str, revision: str | None) -> None:
    """If a database of any origin lost its file or content, opening raises until the lock file is removed."""
    if revision is not None:
        ours(path, revision)  # a file that came without a lock file
    initialised(path)
    LOST[kind](path)
    before = {name: entry[-1] for name, entry in snapshot(directory).items()}
    with pytest.raises(errors.CorruptDatabaseError, match="restore") as caught:
        Database.open(path)
    after = {name: entry[-1] for name, entry in snapshot(directory).items() if not name.endswith(("-wal", "-shm"))}
    assert after == before
    if kind == "removed":
        assert "remove homeagent.db.lock" in str(caught.value)
        (directory / "homeagent.db.lock").unlink()
        with Database.open(path) as database:
            assert database.agents.list() == []


@pytest.mark.parametrize("database", ["absent", "empty"])
def test_orphaned_wal_is_kept(path: Path, database: str) -> None:
    """If the WAL has no database, opening raises; SQLite itself would delete the WAL and start empty."""
    files = [path.with_name("homeagent.db-wal"), *([path] if database == "empty" else [])]
    for file in files:
        file.write_bytes(b"x" * 4096 if file != path else b"")
        file.chmod(0o600)
    with pytest.raises(errors.CorruptDatabaseError, match="restore a backup"):
        Database.open(path)
    assert files[0].read_bytes() == b"x" * 4096
    assert path.exists() == (database == "empty")


JOURNAL = bytes.fromhex("d9d505f920a163d7 00000000 74c490bb 00000000 00000200 00001000").ljust(512, b"\0")
"""The journal of the transaction that makes a file: the file had no page before."""


def half_made(path: Path, first_page: bytes) -> None:
    """Create the files that a power cut leaves of a database's first transaction."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    for name, content in (("homeagent.db", first_page), ("homeagent.db-journal", JOURNAL), ("homeagent.db.lock", b"")):
        path.with_name(name).write_bytes(content)
        path.with_name(name).chmod(0o600)


@pytest.mark.usefixtures("on_a_disk")
@pytest.mark.parametrize("part", ["whole", "begun", "not written"])
def test_a_first_transaction_that_was_cut_off(tmp_path: Path, path: Path, part: str) -> None:
    """If the first transaction was cut off, opening creates the database again, whatever its first page holds."""
    made = tmp_path / "made.db"
    with closing(sqlite(made)) as raw:
        raw.execute(f"PRAGMA application_id={APPLICATION_ID}")
    page = made.read_bytes()
    half_made(path, {"whole": page, "begun": bytes(512) + page[512:], "not written": bytes(4096)}[part])
    assert diagnose(path).severity is Severity.WARNING
    with Database.open(path) as database:
        assert database.status().schema_revision == REVISION
    assert diagnose(path).severity is Severity.OK


def test_a_damaged_database_is_not_taken_for_a_half_made_one(path: Path) -> None:
    """If a database existed before, such a journal does not let SQLite empty the damaged file."""
    initialised(path)
    content = bytes(512) + path.read_bytes()[512:]
    marker = path.with_name("homeagent.db.lock").read_bytes()
    half_made(path, content)
    path.with_name("homeagent.db.lock").write_bytes(marker)
    with pytest.raises(errors.CorruptDatabaseError):
        Database.open(path)
    assert path.read_bytes() == content


# Private files

MODES = """
import json, os, sys
from pathlib import Path

os.umask(int(sys.argv[2], 8))
from homeagent import AgentCreate, Database

path = Path(sys.argv[1])
with Database.open(path) as database:
    with database.unit_of_work() as unit:
        unit.agents.create(AgentCreate(id="umask", name="U", workspace_path="/u"))
    with database.unit_of_work(read_only=True):
        modes = {entry.name: oct(entry.lstat().st_mode & 0o777) for entry in path.parent.iterdir()}
modes["directory"] = oct(path.parent.stat().st_mode & 0o777)
umask = os.umask(0)
assert umask == int(sys.argv[2], 8), umask
print(json.dumps(modes))
"""


@pytest.mark.parametrize(
    "umask", ["000", "777", *(pytest.param(umask, marks=pytest.mark.slow) for umask in ("022", "077"))]
)
@pytest.mark.parametrize("revision", [None, "0001"])
def test_files_are_private_under_any_umask(
    tmp_path: Path, directory: Path, children: Children, umask: str, revision: str | None
) -> None:
    """Under any umask, directories have mode 0700 and all files 0600, and the umask stays unchanged."""
    path = (directory if revision else tmp_path / "new") / "homeagent.db"
    if revision:
        ours(path, revision)
    modes = json.loads(children.run(MODES, path, umask))
    assert modes.pop("directory") == "0o700"
    names = {name if ".backup" not in name else name[name.index(".backup") + 1 :] for name in modes}
    expected = {"homeagent.db", "homeagent.db-wal", "homeagent.db-shm", "homeagent.db.lock", "homeagent.db.open"}
    assert names == expected | ({"backup", "backup.json"} if revision else set())
    assert set(modes.values()) == {"0o600"}


def test_looser_mode_is_repaired(directory: Path, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If the database or a file next to it has a looser mode, opening repairs the mode and logs a warning."""
    initialised(path)
    with Database.open(path) as holder, holder.unit_of_work() as unit:
        unit.agents.create(AgentCreate(id="b", name="B", workspace_path="/b"))
        found = [entry for entry in directory.iterdir() if entry.suffix not in {".lock", ".open"}]
        assert len(found) == 3
        for entry in found:
            entry.chmod(0o644)
        with caplog.at_level(logging.WARNING, "homeagent"):
            Database.open(path).close()
        assert {entry.lstat().st_mode & 0o777 for entry in directory.iterdir()} == {0o600}
    assert sum("had mode 0644" in record.getMessage() for record in caplog.records) == 3


# Opening without needless imports

FRESH = """
import logging, sys

handler = logging.StreamHandler()
logging.getLogger().addHandler(handler)
host = logging.getLogger("host.application")
before = (logging.getLogger().level, list(logging.getLogger().handlers), host.disabled)

from homeagent import Database

Database.open(sys.argv[1]).close()
late = {
    *("alembic", "argon2", "click", "mako", "rich", "sqlalchemy.dialects.postgresql", "typer"),
    *("homeagent.migrations.postgresql", "homeagent.models.schemas"),
}
print(sorted(name for name in sys.modules if name in late or name.startswith("homeagent.maintenance.")))
assert (logging.getLogger().level, list(logging.getLogger().handlers), host.disabled) == before
handlers = [*logging.getLogger("alembic").handlers, *logging.getLogger("homeagent").handlers]
assert all(isinstance(handler, logging.NullHandler) for handler in handlers), handlers
assert not logging.getLogger("homeagent").disabled

from homeagent.models import metadata

(index,) = (each for each in metadata.tables["idempotency_keys"].indexes if each.name == "idx_idempotency_lease")
print([str(index.dialect_options[engine]["where"]) for engine in ("sqlite", "postgresql")])
"""


def test_up_to_date_file_opens_without_needless_imports(path: Path, children: Children) -> None:
    """Modules for upgrades, a server, an index, schemas or an operator are imported on first use, and then complete.

    A new database imports Alembic. Logging is unchanged in both cases.
    """
    index = str(["state = 'in_progress'"] * 2)
    loaded, complete = children.run(FRESH, path, fresh=True).splitlines()
    assert "'alembic'" in loaded
    assert complete == index
    assert children.run(FRESH, path, fresh=True).splitlines() == ["[]", index]


AUDITED = """
import os, sys
from pathlib import Path

path = os.path.realpath(sys.argv[1])
guarded = {path, path + "-wal", path + "-shm", path + "-journal"}
seen = []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        # A FileGuard closes its descriptors after the last connection only.
        by_guard = sys._getframe(1).f_code.co_filename.endswith("foreign_access.py")
        if os.path.realpath(os.fsdecode(arguments[0])) in guarded and not by_guard:
            flags = arguments[2]
            seen.append("made" if flags & os.O_CREAT and flags & os.O_EXCL else "opened")

sys.addaudithook(watch)
from homeagent import AgentCreate, Database

for _ in range(2):
    with Database.open(path) as database:
        with database.unit_of_work() as unit:
            if unit.agents.find_by_id("a") is None:
                unit.agents.create(AgentCreate(id="a", name="A", workspace_path="/a"))
        database.sweep()
        database.status()
        Database.open(path).close()
print(*seen)
"""


@pytest.mark.parametrize(("revision", "expected"), [(None, "made"), ("0001", ""), (REVISION, "")])
def test_database_file_is_never_opened_by_python(
    path: Path, children: Children, revision: str | None, expected: str
) -> None:
    """Only SQLite opens the database's files (except with O_EXCL), as closing another descriptor drops its locks."""
    if revision is not None:
        ours(path, revision)
    assert children.run(AUDITED, path) == expected


def test_opening_waits_for_no_writer(path: Path) -> None:
    """If another unit writes, an up-to-date database still opens, as reading the revision takes no write lock."""
    initialised(path)
    with Database.open(path) as holder, holder.unit_of_work() as unit:
        unit.agents.create(AgentCreate(id="b", name="B", workspace_path="/b"))
        with Database.open(path, busy_timeout=timedelta(0)) as other, other.unit_of_work(read_only=True) as reader:
            assert [agent.id for agent in reader.agents.list()] == ["a"]


def test_new_database(directory: Path, path: Path) -> None:
    """A new file has homeagent's id, is in WAL mode and enforces foreign keys; opening it again changes no file."""
    with Database.open(path) as database, database.unit_of_work() as unit:
        connection = unit.session.connection()
        pragmas = {"application_id": APPLICATION_ID, "journal_mode": "wal", "foreign_keys": 1}
        assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in pragmas} == pragmas
    with closing(sqlite(path)) as raw:
        assert raw.execute(f"SELECT * FROM {VERSION_TABLE}").fetchall() == [(REVISION,)]
    initialised(path)
    before = snapshot(directory)
    for migrate in (True, False):
        with Database.open(path, migrate=migrate) as database:
            assert database.status().schema_revision == REVISION
        assert snapshot(directory) == before


def test_existing_file_with_the_name_of_the_backup(path: Path, clock: Any) -> None:
    """If a file has the name of the backup before an upgrade, the file stays, and the upgrade does not begin."""
    ours(path, "0001")
    taken = path.with_name("homeagent.db.0001-20260102T030405678000Z.backup")
    taken.write_text("mine")
    taken.chmod(0o600)
    with pytest.raises(errors.MigrationError, match="exists already"):
        Database.open(path, clock=clock)
    assert taken.read_text() == "mine"
    clock.advance(seconds=1)
    with Database.open(path, clock=clock, busy_timeout=timedelta(seconds=5)) as database:
        assert database.status().schema_revision == REVISION
