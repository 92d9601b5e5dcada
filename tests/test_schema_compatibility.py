"""Old and new versions work at the same time: no revision breaks the previous version, and the check reports breaks.

CONTRIBUTING.md has the rules for revisions ("Keep the previous version working"). The comparison uses the schemas of
the database before and after the revision, not the operations of the revision.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Container
from datetime import timedelta
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from sqlalchemy import Connection, inspect, text

from homeagent import Database, DeviceStatus, IdempotencyScope, diagnose
from homeagent.errors import SchemaTooNewError
from homeagent.maintenance.doctor import Severity
from homeagent.migrations import REVISION, VERSION_TABLE
from homeagent.migrations.expansion import breaks, structure
from homeagent.migrations.revisions import loaded, run_revisions
from tests.conftest import ROOT, Children, add_device
from tests.migrations.old_databases import plain_engine

SCRIPTS = ROOT / "alembic"
# Up to this revision, no released version worked at the same time as another version.
BASELINE = "0004"
CHECKED = sorted(path.name[:4] for path in (SCRIPTS / "versions").glob("[0-9]*.py") if path.name[:4] > BASELINE)


def problems_of(revision: str, connection: Connection, shown: Container[str], scripts: Path = SCRIPTS) -> list[str]:
    """Return, as sentences, the changes of a revision that break the previous version.

    Pass a connection to a database with no later revision, and the names of CHECKs and triggers that a test shows. A
    trigger must also be declared: the revision has its definition in `SQLITE_TRIGGERS` or `POSTGRESQL_TRIGGERS`.
    """
    modules = {module.revision: module for module in map(loaded, sorted((scripts / "versions").glob("*.py")))}
    script = modules[revision]
    before = str(script.down_revision)
    with connection.begin():
        run_revisions(connection, list(modules.values()), VERSION_TABLE, before)
    old, old_oldest = structure(connection), oldest_revision(connection)
    with connection.begin():
        run_revisions(connection, list(modules.values()), VERSION_TABLE, revision)
    new, new_oldest = structure(connection), oldest_revision(connection)
    declared: str | None = getattr(script, "oldest_revision", None)
    if declared is None:
        triggers = {*getattr(script, "SQLITE_TRIGGERS", ()), *getattr(script, "POSTGRESQL_TRIGGERS", ())}
        names = {name for _, _, name in new if name in shown and (name in triggers or name.startswith("ck_"))}
        problems = list(breaks(old, new, names))
        if old_oldest is not None and new_oldest != old_oldest:
            problems.append("store.oldest_revision changes, and the revision doesn't declare itself a contraction")
        return problems
    problems = []
    if declared > before:
        problems.append(f"it declares that code of {before} can't work with it: drop only what {before} does not use")
    if new_oldest != declared:
        problems.append(f"it declares oldest_revision {declared!r}, and store.oldest_revision is {new_oldest!r}")
    return problems


def oldest_revision(connection: Connection) -> str | None:
    with connection.begin():
        if not inspect(connection).has_table("store"):
            return None
        return str(connection.execute(text("SELECT oldest_revision FROM store")).scalar_one())


def test_no_revision_breaks_the_previous_version(
    engine_name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every revision since the first release only expands, or declares a contraction."""
    empty = request.getfixturevalue("empty_postgres_url") if engine_name == "postgresql" else tmp_path / "scratch.db"
    with plain_engine(empty).connect() as connection:
        assert CHECKED
        assert [(revision, problems_of(revision, connection, SHOWN)) for revision in CHECKED] == [
            (revision, []) for revision in CHECKED
        ]


NEXT = f"{int(REVISION) + 1:04}"
DAY = timedelta(days=1)


def sample(directory: Path, body: str, line: str) -> Path:
    """Return the revisions with a further revision that runs these operations and has this line."""
    scripts = directory / "alembic"
    shutil.copytree(SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    operations = "\n".join(f"    {line}" for line in body.splitlines())
    (scripts / "versions" / f"{NEXT}_sample.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        f'revision, down_revision, branch_labels, depends_on = "{NEXT}", "{REVISION}", None, None\n'
        f"{line}\n\ndef upgrade():\n{operations}\n"
    )
    return scripts


NEW_CHECK = (
    'with op.batch_alter_table("agents") as batch:\n'
    '    batch.create_check_constraint(op.f("ck_agents_name"), "name <> \'x\'")'
)
CHANGED_CHECK = (
    'with op.batch_alter_table("devices") as batch:\n'
    '    batch.drop_constraint(op.f("ck_devices_approved"), type_="check")\n'
    '    batch.create_check_constraint(op.f("ck_devices_approved"), "approved IN (0, 1, 2)")'
)
TRIGGER = 'op.execute("CREATE TRIGGER t AFTER INSERT ON nonces BEGIN DELETE FROM nonces; END")'
DECLARED = 'SQLITE_TRIGGERS = {"t": "AFTER INSERT ON nonces"}'
CONTRACTION = 'with op.batch_alter_table("devices") as batch:\n    batch.drop_column("last_seen_at")'
STORES = f"{CONTRACTION}\nop.execute(\"UPDATE store SET oldest_revision = '{{}}'\")"
DECLARES = "oldest_revision = {!r}"

# The body and a further line of a revision, the CHECK or trigger that a test shows, and the problem that is reported.
JUDGED: dict[str, tuple[str, str, str, str | None]] = {
    "a CHECK that a test shows": (NEW_CHECK, "", "ck_agents_name", None),
    "a CHECK without a test": (NEW_CHECK, "", "", "CHECK ck_agents_name"),
    "a changed CHECK": (CHANGED_CHECK, "", "ck_devices_approved", "CHECK ck_devices_approved"),
    "a trigger that a test shows": (TRIGGER, DECLARED, "t", None),
    "a trigger without a test": (TRIGGER, DECLARED, "", "gets trigger t"),
    "a trigger that is not declared": (TRIGGER, "", "t", "gets trigger t"),
    "a contraction": (STORES.format(REVISION), DECLARES.format(REVISION), "", None),
    "a contraction that old code can't use": (STORES.format(NEXT), DECLARES.format(NEXT), "", "can't work with it"),
    "a contraction that stores nothing": (CONTRACTION, DECLARES.format(REVISION), "", "store.oldest_revision is"),
    "a contraction that is not declared": (STORES.format(REVISION), "", "", "declare itself"),
}


@pytest.mark.parametrize(
    ("engine_name", "kind"),
    [
        *(("sqlite", kind) for kind in JUDGED),
        *(pytest.param("postgresql", kind, marks=pytest.mark.slow) for kind in JUDGED if "CHECK" in kind),
    ],
)
def test_each_revision_is_judged(target: str, tmp_path: Path, kind: str) -> None:
    """A CHECK or trigger passes only if a test shows it, and a dropped column only if the revision declares it."""
    body, line, shown, problem = JUDGED[kind]
    with plain_engine(target).connect() as connection:
        problems = problems_of(NEXT, connection, [shown], sample(tmp_path, body, line))
    if problem is None:
        assert problems == []
    else:
        assert any(problem in line for line in problems), problems
        assert len(problems) == 1 or "contraction" in kind


def make_newer(target: str, *, oldest: str) -> None:
    """Give a database the state after a future version: another revision, and a further column."""
    with plain_engine(target).connect() as connection, connection.begin():
        connection.execute(text("ALTER TABLE devices ADD COLUMN later_room TEXT DEFAULT 'hall'"))
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
        connection.execute(text("UPDATE store SET oldest_revision = :oldest"), {"oldest": oldest})


def schema_of(target: str) -> list[Any]:
    """Return the schema's revision and the definition of the further column."""
    with plain_engine(target).connect() as connection, connection.begin():
        return [
            connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one(),
            connection.execute(text("SELECT epoch, oldest_revision FROM store")).one(),
            connection.execute(text("SELECT id, later_room FROM devices ORDER BY id")).all(),
        ]


@pytest.mark.parametrize("oldest", sorted({BASELINE, REVISION}))
def test_an_older_version_works_on_a_compatible_newer_schema(target: str, oldest: str) -> None:
    """If the newer schema permits older code, the older version works and leaves the schema unchanged."""
    Database.open(target).close()
    make_newer(target, oldest=oldest)
    for migrate in (True, False):
        with Database.open(target, migrate=migrate) as database:
            add_device(database, f"lamp-{migrate}", approved=True)
            assert database.status().schema_revision == "9999"
            database.sweep()
    rows = [("lamp-False", "hall"), ("lamp-True", "hall")]
    assert schema_of(target) == ["9999", (1, oldest), rows]


@pytest.mark.parametrize("migrate", [True, False])
def test_an_older_version_refuses_an_incompatible_newer_schema(target: str, migrate: bool) -> None:
    """If the newer schema requires newer code, opening refuses the database and leaves the schema unchanged."""
    Database.open(target).close()
    make_newer(target, oldest="9998")
    before = schema_of(target)
    with pytest.raises(SchemaTooNewError) as caught:
        Database.open(target, migrate=migrate)
    assert (caught.value.revision, caught.value.known) == ("9999", REVISION)
    assert schema_of(target) == before


@pytest.mark.parametrize("revision", ["", "0000", "garbage", "99999", "1e9"])
def test_an_impossible_revision_is_refused(target: str, revision: str) -> None:
    """If no release can have a revision's number, `Database.open` refuses the schema, and the doctor reports it."""
    Database.open(target).close()
    with plain_engine(target).connect() as connection, connection.begin():
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = :revision"), {"revision": revision})
    for migrate in (True, False):
        with pytest.raises(SchemaTooNewError) as caught:
            Database.open(target, migrate=migrate)
        assert (caught.value.revision, caught.value.known) == (revision, REVISION)
    (finding,) = [finding for finding in diagnose(target).findings if finding.check == "schema_revision"]
    assert (finding.severity, finding.facts["revision"]) == (Severity.CRITICAL, revision)


def archive_of(revision: str) -> bytes:
    """Return the newest code for a revision from the history of this checkout, as a ZIP file."""
    module, line = "homeagent/migrations/revisions.py", f'REVISION = "{revision}"'

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout

    try:
        # The newest commit that added or removed this line.
        commit = git("log", "-1", "--format=%H", f"-S{line}", "--", module).decode().strip()
        is_there = line.encode() in git("show", f"{commit}:{module}")
        return git("archive", "--format=zip", "HEAD" if is_there else f"{commit}^", "homeagent", "alembic")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"needs the history of the checkout back to the last commit at revision {revision}")


@pytest.fixture
def targets(sqlite_path: Path, empty_postgres_url: str) -> list[str]:
    Database.open(empty_postgres_url).close()
    return [str(sqlite_path), empty_postgres_url]


def run_old_code(revision: str, code: Path, targets: list[str], children: Children) -> None:
    """Run the device operations of the newest code for a revision on the databases, in one process."""
    ZipFile(io.BytesIO(archive_of(revision))).extractall(code)
    children.finish(children.start(WRITES_DEVICES, code, revision, *targets, path=code))


WRITES_DEVICES = """
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import homeagent
from homeagent import Database, Device, DevicePair, DeviceUpdate, Role
from homeagent.migrations import REVISION

code, revision, *targets = sys.argv[1:]
assert Path(homeagent.__file__).is_relative_to(code) and REVISION == revision, (homeagent.__file__, REVISION)
def write(database):
    for name in ("admin", "phone", "lock", "gone"):
        secret = database.pair(DevicePair(id=name, role=Role.ADMIN)).shared_secret
        with database.unit_of_work() as unit:
            assert unit.devices.approve(name)
        assert database.verify_secret(name, secret) is not None
        database.rotate_secret(name, overlap=timedelta(hours=1))
    with database.unit_of_work() as unit:
        assert unit.devices.revoke("phone", reason="lost") and unit.devices.revoke("lock")
        again = {"expected_status": "revoked"} if revision > "0006" else {}
        assert unit.devices.approve("lock", **again)
        assert unit.devices.update_last_seen("lock") and unit.devices.delete("gone")
        unit.devices.update("lock", DeviceUpdate(metadata={"room": "hall"}))
        for name, approved in (("orm-in", True), ("orm-out", False)):
            unit.session.add(
                Device(id=name, role=Role.NODE, shared_secret_hash="h", paired_at=datetime.now(UTC), approved=approved)
            )
        unit.session.flush()
        unit.session.get(Device, "orm-in").approved = False
        unit.session.get(Device, "orm-out").approved = True
    database.pair(DevicePair(id="new", role=Role.CLIENT))
    database.sweep()
for target in targets:
    with Database.open(target) as database:
        write(database)
"""


def test_code_of_0005_writes_what_0006_accepts(targets: list[str], tmp_path: Path, children: Children) -> None:
    """If the code of revision 0005 runs all its device operations on the present schema, no CHECK refuses a row."""
    run_old_code("0005", tmp_path / "code", targets, children)
    expected = {"approved": ["admin", "lock", "orm-out"], "pending": ["new", "orm-in"], "revoked": ["phone"]}
    for target in targets:
        with Database.open(target) as database:
            found = {status: [device.id for device in database.devices.list(status=status)] for status in DeviceStatus}
        assert found == expected


def test_changes_of_old_code_are_in_the_feed(targets: list[str], tmp_path: Path, children: Children) -> None:
    """If the code of revision 0007 runs its device operations on the present schema, the feed has all changes."""
    run_old_code("0007", tmp_path / "code", targets, children)
    for target in targets:
        with Database.open(target) as database:
            changes = database.devices.changes(after=0, limit=1000)
        kinds: dict[str, list[str]] = {}
        for change in changes:
            kinds.setdefault(str(change.device_id), []).append(change.kind.value)
        assert kinds == {
            "admin": ["paired", "approved", "rotated"],
            "phone": ["paired", "approved", "rotated", "revoked"],
            "lock": ["paired", "approved", "rotated", "revoked", "approved", "updated"],
            "gone": ["paired", "approved", "rotated", "deleted"],
            "orm-in": ["paired", "approved", "revoked"],
            "orm-out": ["paired", "approved"],
            "new": ["paired"],
        }
        assert [change.number for change in changes] == list(range(1, len(changes) + 1))


def test_code_of_0009_deletes_results(targets: list[str], tmp_path: Path, children: Children) -> None:
    """If the code of revision 0009 deletes a device on the present schema, only the results of the device are gone."""
    for target in targets:
        with Database.open(target) as database:
            for device_id in ("gone", "lock", "old"):
                # A new pairing keeps the record of a running call.
                database.idempotency_keys.claim(
                    IdempotencyScope(device_id, "m", "k"), fingerprint="", lease=DAY, ttl=DAY
                )
    run_old_code("0009", tmp_path / "code", targets, children)
    for target in targets:
        with Database.open(target) as database:
            connection: Any
            with database.read_connection() as connection:
                keys = connection.execute(text("SELECT device_id FROM idempotency_keys ORDER BY 1")).scalars().all()
            assert (keys, database.devices.find_by_id("gone")) == (["lock", "old"], None)
            kinds = [change.kind for change in database.devices.changes() if change.device_id == "gone"]
        assert kinds == ["paired", "approved", "rotated", "deleted"]


# The test of the previous version's code, for each new CHECK on an old column and each new trigger on an old table.
SHOWN = {
    "ck_devices_approved": test_code_of_0005_writes_what_0006_accepts,
    **dict.fromkeys(
        (
            "homeagent_device_inserted",
            "homeagent_device_updated",
            "homeagent_device_deleted",
            "homeagent_store_inserted",
            "homeagent_store_updated",
            "homeagent_device_added_or_deleted",
            "homeagent_device_changed",
            "homeagent_devices_truncated",
            "homeagent_epoch_begun",
        ),
        test_changes_of_old_code_are_in_the_feed,
    ),
    **dict.fromkeys(
        ("homeagent_device_keys_deleted", "homeagent_device_keys_left", "homeagent_device_change_timed"),
        test_code_of_0009_deletes_results,
    ),
}
