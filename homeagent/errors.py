"""Errors of this package. The attributes of an error contain the ids of rows. The message names the remedy.

Catch `HomeAgentError` to catch all errors. Related errors have a base class: `InvalidArgumentError`, `NotFoundError`,
`AlreadyExistsError`, `ConflictError`, `IdempotencyError` or `DatabaseError`. A program can log the messages. Messages
contain no secret, hash, nonce, idempotency key, stored result or bound parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from homeagent.call_errors import (
    AccessDeniedError,
    AuthenticationError,
    EffectFailedError,
    EffectNotStartedError,
    FingerprintMismatchError,
    HandshakeError,
    HomeAgentError,
    IdempotencyError,
    IdempotencyInProgressError,
    InvalidArgumentError,
    LeaseLostError,
    OutcomeUnknownError,
    TooManyAttemptsError,
    UnitStateError,
)

# fmt: off
__all__ = [
    "AccessDeniedError", "AgentExistsError", "AgentInUseError", "AgentNotFoundError", "AlreadyExistsError",
    "ApprovalChangedError", "AuthenticationError", "BackupStoppedError", "CommitUnknownError", "ConflictError",
    "ConnectionLostError", "CorruptDatabaseError", "DatabaseBusyError", "DatabaseClosedError", "DatabaseError",
    "DatabaseIOError", "DatabaseMovedError", "DeviceExistsError", "DeviceNotApprovedError", "DeviceNotFoundError",
    "DiskFullError", "EffectFailedError", "EffectNotStartedError", "FingerprintMismatchError", "ForeignAccessError",
    "ForeignDatabaseError", "HandshakeError", "HomeAgentError", "IdempotencyError", "IdempotencyInProgressError",
    "IdempotencyKeyExistsError", "IncompatibleRevisionError", "InsecureFileError", "InvalidArgumentError",
    "KeyLimitError", "LastAdminError", "LeaseLostError", "LimitError", "MigrationError", "NonceLimitError",
    "NotFoundError", "OutcomeUnknownError", "PendingLimitError", "ReadOnlyError", "RouteTakenError",
    "SchemaChangedError", "SchemaOutdatedError", "SchemaTooNewError", "SessionExistsError", "SessionNotFoundError",
    "SourceChangedError", "StandbyError", "TargetNotEmptyError", "TooManyAttemptsError", "TooManyFilesError",
    "TransientError", "UnitStateError",
]
# fmt: on


class NotFoundError(HomeAgentError):
    """The store has no row with the given id. The message contains only the first 1,024 characters of the id."""


class DeviceNotFoundError(NotFoundError):
    """No device has the given id. Remedy: pair the device, or find the id by `homeagent devices list`."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        super().__init__(f"no device {device_id[:1024]!r}: pair it first, or find its id with 'homeagent devices list'")


class AgentNotFoundError(NotFoundError):
    """No agent has the given id. Remedy: create the agent, or find the right id by `agents.list()`."""

    def __init__(self, agent_id: str) -> None:
        self.agent_id = agent_id
        super().__init__(f"no agent {agent_id[:1024]!r}: create it first, or find its id with agents.list()")


class SessionNotFoundError(NotFoundError):
    """No session has the given id. Remedy: create the session, or call `sessions.resolve()`."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        super().__init__(f"no session {session_id[:1024]!r}: create it, or call sessions.resolve()")


class AlreadyExistsError(HomeAgentError):
    """A row with the given id or key exists. The existing row stays unchanged."""


class DeviceExistsError(AlreadyExistsError):
    """A device with the given id is already paired. Remedy: call `rotate_secret()`, or delete the device first."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        super().__init__(f"device {device_id!r} exists: delete it to pair it again, or call rotate_secret()")


class AgentExistsError(AlreadyExistsError):
    """An agent with the given id already exists. Remedy: change the agent by `agents.update()`."""

    def __init__(self, agent_id: str) -> None:
        self.agent_id = agent_id
        super().__init__(f"agent {agent_id!r} exists: change it with agents.update()")


class SessionExistsError(AlreadyExistsError):
    """A session with the given id already exists. Remedy: call `sessions.touch()` or `sessions.index()`."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        super().__init__(f"session {session_id!r} exists: touch() it, or index() it from its transcript")


class IdempotencyKeyExistsError(AlreadyExistsError):
    """The idempotency key already has an unexpired record. Remedy: call `find()`, and answer with the stored result."""

    def __init__(self, device_id: str, method: str) -> None:
        self.device_id = device_id
        self.method = method
        super().__init__(f"device {device_id!r} has a record for this key of {method!r}: find() it and answer from it")


class ConflictError(HomeAgentError):
    """The present state of the store does not permit the change. The method that raised the error did not change a row.
    Remedy: read the row again, and correct the violating values.

    Without a violated constraint, the error has `constraint=None` and `kind=None`.

    Attributes:
        table: name of the table. The value is None if the table is not known.
        constraint: name of the violated constraint. For an unnamed constraint, the value contains the names of the
            columns. If homeagent can't identify the constraint, the value is None. SQLite does not report the violated
            foreign key.
        kind: kind of the constraint: `unique`, `foreign_key`, `check`, `not_null`, `exclusion` or `datatype`. A
            violated primary key also has the kind "unique". The kind "exclusion" occurs only on PostgreSQL. The kind
            "datatype" occurs only for a STRICT table of SQLite.
    """

    table: str | None = None
    constraint: str | None = None
    kind: str | None = None


class AgentInUseError(ConflictError):
    """The agent still has sessions. Remedy: delete the sessions first, or pass `delete_sessions=True`."""

    def __init__(self, agent_id: str, session_count: int) -> None:
        self.agent_id = agent_id
        self.session_count = session_count
        super().__init__(f"agent {agent_id!r} has {session_count} session(s): delete them, or use delete_sessions=True")


class RouteTakenError(ConflictError):
    """A session can't move, because another session holds the new route. The other session's id is
    `error.session_id`. Remedy: move or delete the other session, and then try again.
    """

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        super().__init__(f"session {session_id!r} holds this route: move() or delete() that session, then try again")


class LastAdminError(ConflictError):
    """The device is the last approved admin. Remedy: approve another admin first, or pass `force=True`."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        super().__init__(f"device {device_id!r} is the last approved admin: approve another, or pass force=True")


class ApprovalChangedError(ConflictError):
    """The device changed after the administrator had read the device. The changed field is `error.changed`. Remedy:
    show the device again, and ask for a new decision.
    """

    def __init__(self, device_id: str, changed: str) -> None:
        self.device_id = device_id
        self.changed = changed
        revoked = ", a revoked device with expected_status=REVOKED or --status revoked" if changed == "status" else ""
        super().__init__(f"device {device_id!r} has another {changed} now: show it again, then approve it{revoked}")


class DeviceNotApprovedError(ConflictError):
    """Only an approved device can get a new secret with an overlap. During an overlap, the old secret still works.
    Remedy: leave out `overlap=…`.
    """

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        super().__init__(f"device {device_id!r} is not approved: rotate its secret without an overlap")


class LimitError(ConflictError):
    """The store contains the maximum number of rows of a kind. The maximum is `error.limit`."""

    def __init__(self, message: str, *, limit: int) -> None:
        self.limit = limit
        super().__init__(message)


class PendingLimitError(LimitError):
    """Too many devices wait for approval. Remedy: approve or delete some devices, or raise the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit:,} devices wait for their approval: approve or delete some, or raise Limits.pending_devices"
            if limit
            else "pairing is closed: Limits.pending_devices is 0",
            limit=limit,
        )


class NonceLimitError(LimitError):
    """The device has the maximum number of unexpired nonces. Remedy: slow the device down or call `nonces.forget()`."""

    def __init__(self, device_id: str, limit: int) -> None:
        self.device_id = device_id
        stored = f"device {device_id!r} has {limit:,} nonces that have not expired"
        super().__init__(f"{stored}: slow the device down, or release its nonces by nonces.forget()", limit=limit)


class KeyLimitError(LimitError):
    """The device has the maximum number of unexpired idempotency keys. The effect of the call did not begin. Remedy:
    let the device make fewer calls, or raise `Limits.keys_per_device`.
    """

    def __init__(self, device_id: str, limit: int) -> None:
        self.device_id = device_id
        stored = f"device {device_id!r} has {limit:,} idempotency keys that have not expired"
        super().__init__(f"{stored}: slow the device down, or raise Limits.keys_per_device", limit=limit)


class TargetNotEmptyError(ConflictError):
    """The target of a copy is not empty. The target stays unchanged. Remedy: name an empty or absent database."""

    def __init__(self, table: str) -> None:
        self.table: str = table
        super().__init__(f"the target holds {table} already: name an empty database, or one that doesn't exist yet")


class SourceChangedError(ConflictError):
    """Another unit wrote to the source, so homeagent undid the copy. Remedy: stop every gateway, and copy again."""

    def __init__(self, table: str) -> None:
        self.table: str = table
        super().__init__(
            f"{table} of the source was written while it was copied: stop every gateway and sweeper that uses it, "
            "then copy again; for a trial, pass live=True (--live) to copy the state at the beginning"
        )


class DatabaseError(HomeAgentError):
    """The engine refused an operation, or a database file is unusable. Remedy: see the message."""


class DatabaseBusyError(DatabaseError):
    """Other units kept the database busy for longer than the `busy_timeout`. Remedy: shorten the unit that the message
    names, or raise `busy_timeout`.
    """


class TransientError(DatabaseBusyError):
    """Another transaction or process prevented the unit. The database rolled back the unit, and the unit can run again.

    `Database.run` repeats the unit until `busy_timeout` ends, and then raises the last error. Remedy: call `run()`
    instead of `unit_of_work`. If `run()` raised the error, repeat the unit later, or raise `busy_timeout`.
    """

    sqlstate: str | None = None
    """PostgreSQL's error code if a lock timed out or a statement was cancelled. None for other errors."""


class ConnectionLostError(DatabaseError):
    """The server can't be reached, or the connection ended before COMMIT. Remedy: check the server, and run the unit
    again.
    """


class CommitUnknownError(DatabaseError):
    """homeagent does not know whether the unit was committed (SQLSTATE 08007).

    On PostgreSQL, the connection was lost during COMMIT. PostgreSQL can also cancel the wait for a synchronous standby.
    On SQLite, homeagent could not remove a failed commit from the WAL. Remedy: before a retry, check whether the unit's
    rows exist. With `idempotent=True`, `Database.run` repeats the unit.
    """


class SchemaTooNewError(DatabaseError):
    """A newer version of homeagent or of the application upgraded the database. The present version does not change the
    database. Remedy: upgrade homeagent or the application, or restore an older backup.
    """

    def __init__(self, revision: str, *, known: str, application: str | None = None) -> None:
        self.revision = revision
        self.known = known
        self.application = application
        of, name = (" of the application " + application, application) if application else ("", "homeagent")
        super().__init__(
            f"the database is at schema revision {revision!r}{of}, which this version (up to {known!r}) does not know: "
            f"upgrade {name}, or restore a backup made before the database was upgraded"
        )


class SchemaOutdatedError(DatabaseError):
    """The database is absent or needs an upgrade. With `migrate=False`, homeagent does not create or upgrade a
    database. Remedy: run `homeagent migrate`, or open the database with `migrate=True`.

    The attribute `error.location` is a path, a URL without password, or None. If only the application's revisions are
    missing, `error.application` is the application's name. Otherwise `error.application` is None.
    """

    def __init__(
        self, revision: str | None, *, needed: str, location: str | None = None, application: str | None = None
    ) -> None:
        self.revision = revision
        self.needed = needed
        self.location = location
        self.application = application
        place = "" if location is None else f" at {location!r}"
        if application is not None:
            message = f"the database is at revision {revision!r} of the application {application}, needed is {needed!r}"
        elif revision is None:
            message = f"there is no database yet{place} (this version needs schema revision {needed!r})"
        else:
            message = f"the database is at schema revision {revision!r} and this version needs {needed!r}"
        option = "" if application is None else " --migrations PACKAGE:FOLDER"
        remedy = f"run 'homeagent migrate{option}', or open it with migrate=True"
        if revision is None and application is None:
            remedy = "check the name, or create it with 'homeagent init' or with migrate=True"
        super().__init__(f"{message}: {remedy}")


class SchemaChangedError(DatabaseError):
    """Statements outside of revisions changed the schema. Stored rows can violate the rules of homeagent's schema.
    Remedy: undo the changes, or pass the application's triggers in `acknowledged=`.

    The failed restore, copy, upgrade or adoption does not change the database. The list `error.changes` names each
    changed object in a sentence.
    """

    def __init__(self, changes: list[str], *, location: str, command: str | None, triggers: Sequence[str] = ()) -> None:
        self.changes = changes
        self.location = location
        shown = "; ".join(changes[:10]) + ("; …" if len(changes) > 10 else "")
        first = "" if command is None else f" (the first step is: {command})"
        accept = f"; if a trigger is the application's, pass acknowledged={list(triggers)!r} or --acknowledge instead"
        super().__init__(
            f"the schema of {location} was changed by hand: {shown}. Undo the change{first}, then try again"
            f"{accept if triggers else ''}; for a backup, undo the change in a copy of the file and restore the copy. "
            "Nothing was changed"
        )


class IncompatibleRevisionError(DatabaseError):
    """A revision breaks code of the application's previous version (see `homeagent.testing.check_revisions`). Remedy:
    change the revision as the error says.

    The revision's id is `error.revision`. The list `error.problems` has a text for each incompatible change. Each text
    names the table or column, and the remedy.
    """

    def __init__(self, revision: str, *, application: str, problems: list[str]) -> None:
        self.revision = revision
        self.application = application
        self.problems = problems
        super().__init__(
            f"the revision {revision!r} of {application} breaks code of the version before: {'; '.join(problems)}"
        )


class MigrationError(DatabaseError):
    """An upgrade failed and was rolled back. Remedy: correct the cause in the message, and open the database again.

    The attribute `error.backup` is the path of homeagent's backup. Without a backup, `error.backup` is None.
    """

    def __init__(self, message: str, *, backup: Path | None = None) -> None:
        self.backup = backup
        super().__init__(message)

    @property
    def cause(self) -> BaseException | None:
        """Exception that a revision's code raised, or None for a database error."""
        return self.__cause__


class ForeignAccessError(DatabaseError):
    """Another SQLite library in this process accessed the file of the database. Remedy: access the file only by
    `Database.read_connection` or a store.
    """


class ForeignDatabaseError(DatabaseError):
    """The file or schema belongs to another application and stays unchanged. Remedy: name another path, or add
    homeagent's tables by `homeagent init --adopt`.
    """


class CorruptDatabaseError(DatabaseError):
    """The file is damaged, or is not a SQLite database. The file stays unchanged, and does not count as empty. Remedy:
    restore the newest good backup.
    """


class DatabaseMovedError(CorruptDatabaseError):
    """An open database's file or WAL was deleted, moved or replaced. The unit was not committed.

    Remedy: put the original file back. To use a different file, close and reopen the database.
    """


class InsecureFileError(DatabaseError):
    """The path is a link, or another user could access the file. Remedy: correct the problem that the message names."""


class DiskFullError(DatabaseError):
    """The disk is full. The database rolled back the unit. Remedy: free some space, and repeat the unit."""


class DatabaseIOError(DatabaseError):
    """The system could not read or write a database file. The database rolled back the unit. Remedy: check the disk."""


class TooManyFilesError(DatabaseError):
    """The process or the machine reached its limit of open files. The database rolled back the unit. Remedy: close some
    files, or raise the limit (`ulimit -n`).
    """


class ReadOnlyError(DatabaseError):
    """The database, its file system or this unit of work is read-only. Remedy: open the unit without `read_only=True`,
    or make the file system writable.
    """


class StandbyError(ReadOnlyError):
    """The PostgreSQL server is a standby and refuses writes. With a primary among the URL's hosts, `Database.run` runs
    the unit again. Remedy: name all hosts in the URL, with `target_session_attrs=read-write`.
    """

    def __init__(self) -> None:
        message = "the PostgreSQL server is a standby and takes no writes: name all hosts in the URL, with "
        super().__init__(message + "target_session_attrs=read-write, so that the primary is found")


class BackupStoppedError(DatabaseError):
    """The caller stopped a backup. homeagent deleted the incomplete copy. Remedy: start the backup again."""


class DatabaseClosedError(DatabaseError):
    """The database was closed, or was opened before a fork. Remedy: open the database again."""
