"""Errors of this package. The attributes of an error contain the ids of the rows, and the message names the remedy.

Catch `HomeAgentError` to catch all errors. To catch related errors, catch one of the base classes
`InvalidArgumentError`, `NotFoundError`, `AlreadyExistsError`, `ConflictError`, `IdempotencyError` and `DatabaseError`.
A program can log the messages, because no message contains a secret, hash, nonce, idempotency key, stored result or
bound parameter.
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
    """No device has the given id. Remedy: pair the device, or find the id in the output of `homeagent devices list`."""

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
    """A row with the given id or key exists already. homeagent did not change the existing row."""


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
    Remedy: read the row again, and correct the values that violate the constraint.

    If no constraint was violated, the error has `constraint=None` and `kind=None`.

    Attributes:
        table: name of the table. The value is None if the table is not known.
        constraint: name of the violated constraint. If the constraint has no name, the value has the names of the
            columns. The value is None if the database does not report the name, for example for a foreign key on
            SQLite.
        kind: kind of the constraint: `unique`, `foreign_key`, `check`, `not_null`, `exclusion` or `datatype`. A
            violated primary key also has the kind `unique`. The kind `exclusion` occurs only on PostgreSQL. The kind
            `datatype` occurs only for a STRICT table of SQLite.
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
    """Another session, `error.session_id`, holds the new route of a moved session. Remedy: move or delete the other
    session, and then try again.
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
    """The device has changed since the administrator read the device. `error.changed` is the name of the changed field.
    Remedy: show the device to the administrator again, and ask for a new decision.
    """

    def __init__(self, device_id: str, changed: str) -> None:
        self.device_id = device_id
        self.changed = changed
        revoked = ", a revoked device with expected_status=REVOKED or --status revoked" if changed == "status" else ""
        super().__init__(f"device {device_id!r} has another {changed} now: show it again, then approve it{revoked}")


class DeviceNotApprovedError(ConflictError):
    """A device that is not approved can't get a new secret with an overlap. During an overlap, the old secret still
    works. Remedy: leave out `overlap=…`.
    """

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        super().__init__(f"device {device_id!r} is not approved: rotate its secret without an overlap")


class LimitError(ConflictError):
    """The store already contains the maximum number of rows of a kind. `error.limit` is the maximum number."""

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
    """Another unit wrote to the source during a copy, so homeagent undid the copy. Remedy: stop every gateway, and copy
    again.
    """

    def __init__(self, table: str) -> None:
        self.table: str = table
        super().__init__(
            f"{table} of the source was written while it was copied: stop every gateway and sweeper that uses it, "
            "then copy again; for a trial, pass live=True (--live) to copy the state at the beginning"
        )


class DatabaseError(HomeAgentError):
    """The engine refused an operation, or a database file is not in the required state. Remedy: see the message."""


class DatabaseBusyError(DatabaseError):
    """Other units kept the database busy for longer than the `busy_timeout`. Remedy: shorten the unit that the message
    names, or raise `busy_timeout`.
    """


class TransientError(DatabaseBusyError):
    """The unit conflicted with another transaction, and the database rolled back the unit. `Database.run` runs the
    whole unit again. Remedy: call `run()` instead of `unit_of_work`, or repeat the unit.
    """

    sqlstate: str | None = None
    """PostgreSQL's error code if a lock timed out or a statement was cancelled. None for other errors."""


class ConnectionLostError(DatabaseError):
    """The server can't be reached, or the connection ended before COMMIT. Remedy: check the server, and run the unit
    again.
    """


class CommitUnknownError(DatabaseError):
    """homeagent can't find out whether the database committed the unit (SQLSTATE 08007, transaction resolution
    unknown).

    On PostgreSQL, the connection was lost before the answer to COMMIT arrived, or PostgreSQL cancelled the wait for a
    synchronous standby. On SQLite, COMMIT failed, and homeagent could not remove the failed commit from the WAL.
    Remedy: before a retry, check whether the unit's rows exist. If the caller passed `idempotent=True`, `Database.run`
    repeats the unit after this error.
    """


class SchemaTooNewError(DatabaseError):
    """A newer version of homeagent or of the application upgraded the database. The older version, which raises the
    error, does not change the database. Remedy: upgrade homeagent or the application, or restore a backup from before
    the upgrade.
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
    """The database does not exist or needs an upgrade, and `migrate=False` forbids both the creation and the upgrade.
    Remedy: run `homeagent migrate`, or open the database with `migrate=True`.

    `error.location` is the path of the database, the URL of the server without the password, or None. If only revisions
    of the application are missing, `error.application` is the application's name. Otherwise `error.application` is
    None.
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
    """The schema was changed by statements that are not a part of a revision. The stored rows can violate the rules of
    homeagent's schema. Remedy: undo the changes, or list the application's triggers in the argument `acknowledged`.

    A restore, a copy, an upgrade and an adoption raise this error, and do not change the database. `error.changes` is a
    list with a sentence for each change. Each sentence names the changed object, such as a table and its index.
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

    `error.revision` is the id of the revision. `error.problems` is a list with a text for each change that breaks old
    code. Each text names the table or column, and the remedy.
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

    `error.backup` is the path of the backup that homeagent made before the upgrade, or None for a new database.
    """

    def __init__(self, message: str, *, backup: Path | None = None) -> None:
        self.backup = backup
        super().__init__(message)

    @property
    def cause(self) -> BaseException | None:
        """Exception that the code of a revision raised, or None if the database raised the exception."""
        return self.__cause__


class ForeignAccessError(DatabaseError):
    """Another SQLite library in this process opened or tried to open the file of an open database. Remedy: access the
    file only by `Database.read_connection` or a store.
    """


class ForeignDatabaseError(DatabaseError):
    """The file or schema belongs to another application. homeagent did not change the file or schema. Remedy: name
    another path, or add homeagent's tables by `homeagent init --adopt`.
    """


class CorruptDatabaseError(DatabaseError):
    """The file is damaged, or is not a SQLite database. homeagent does not change a damaged file, and does not treat
    the file as empty. Remedy: restore the newest good backup.
    """


class DatabaseMovedError(CorruptDatabaseError):
    """The file or its WAL was deleted, moved or replaced while the database was open. The database did not commit the
    unit.

    Remedy: put the original file back, so that new units can commit. To use a different file, close the database
    and open the database again.
    """


class InsecureFileError(DatabaseError):
    """The path is a link, or another user could read or replace the file. Remedy: correct the problem that the message
    names.
    """


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
    """The PostgreSQL server is a standby and refuses writes. `Database.run` searches for the primary among the hosts of
    the URL, and runs the unit again. Remedy: name all hosts in the URL, with `target_session_attrs=read-write`.
    """

    def __init__(self) -> None:
        message = "the PostgreSQL server is a standby and takes no writes: name all hosts in the URL, with "
        super().__init__(message + "target_session_attrs=read-write, so that the primary is found")


class BackupStoppedError(DatabaseError):
    """The caller stopped a backup. homeagent deleted the incomplete copy. Remedy: start the backup again."""


class DatabaseClosedError(DatabaseError):
    """The database was closed, or was opened before a fork. Remedy: open the database again."""
