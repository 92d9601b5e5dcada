"""Every error that the package raises, each with the ids it speaks of and a message that names the remedy.

Catch `HomeAgentError` for all of them, or one of its families: a bad argument, something absent, a duplicate,
a conflict with the present state, the idempotency state machine, or the engine and its files. A message never
holds a secret, a hash, a nonce, an idempotency key, a stored result or a bound parameter, so it may be logged.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import JsonValue

__all__ = [
    "AgentExistsError",
    "AgentInUseError",
    "AgentNotFoundError",
    "AlreadyExistsError",
    "ApprovalChangedError",
    "BackupStoppedError",
    "CommitUnknownError",
    "ConflictError",
    "ConnectionLostError",
    "CorruptDatabaseError",
    "DatabaseBusyError",
    "DatabaseClosedError",
    "DatabaseError",
    "DatabaseIOError",
    "DatabaseMovedError",
    "DeviceExistsError",
    "DeviceNotApprovedError",
    "DeviceNotFoundError",
    "DiskFullError",
    "EffectFailedError",
    "EffectNotStartedError",
    "FingerprintMismatchError",
    "ForeignAccessError",
    "ForeignDatabaseError",
    "HomeAgentError",
    "IdempotencyError",
    "IdempotencyInProgressError",
    "IdempotencyKeyExistsError",
    "InsecureFileError",
    "InvalidArgumentError",
    "LastAdminError",
    "LeaseLostError",
    "LimitError",
    "MigrationError",
    "NonceLimitError",
    "NotFoundError",
    "OutcomeUnknownError",
    "PendingLimitError",
    "ReadOnlyError",
    "SchemaChangedError",
    "SchemaOutdatedError",
    "SchemaTooNewError",
    "SessionExistsError",
    "SessionNotFoundError",
    "SourceChangedError",
    "StandbyError",
    "TargetNotEmptyError",
    "TooManyAttemptsError",
    "TooManyFilesError",
    "TransientError",
    "UnitStateError",
]


def _rebuild(kind: type[HomeAgentError], args: tuple[object, ...], attributes: dict[str, object]) -> HomeAgentError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class HomeAgentError(Exception):
    """The root of every error of this package."""

    def __reduce__(self) -> tuple[object, ...]:
        # Pickle would call __init__ with the finished message, where most of these take ids: an error that
        # crosses a process boundary keeps its message and its attributes this way.
        return (_rebuild, (type(self), self.args, self.__dict__))


class InvalidArgumentError(HomeAgentError, ValueError):
    """An argument is outside what the method accepts; nothing was read or written."""


class UnitStateError(HomeAgentError):
    """A unit of work was used after its end, or a second write unit was opened inside the first."""


class TooManyAttemptsError(HomeAgentError):
    """Too many checks of secrets failed for this id, or too many slow hashes wait; no hash was computed (HTTP: 429).

    `retry_after` says when to try again. `device_id` is None if the error is about waiting hashes and not about an id.
    """

    def __init__(self, reason: str, *, retry_after: timedelta, device_id: str | None = None) -> None:
        self.retry_after = retry_after
        self.device_id = device_id
        super().__init__(
            f"{reason}: try again in {retry_after.total_seconds():.3f} s, or give the device a generated secret, whose "
            "checks are never refused"
        )


# What is absent


class NotFoundError(HomeAgentError):
    """What was asked for by its id is not in the store."""


class DeviceNotFoundError(NotFoundError):
    """No device has this id."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        super().__init__(
            f"no device {device_id!r}: pair it first, or look for it with devices.list() or 'homeagent devices list'"
        )


class AgentNotFoundError(NotFoundError):
    """No agent has this id."""

    def __init__(self, agent_id: str) -> None:
        self.agent_id = agent_id
        super().__init__(f"no agent {agent_id!r}: create it first, or look for it with agents.list()")


class SessionNotFoundError(NotFoundError):
    """No session has this id."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        super().__init__(f"no session {session_id!r}: create it, or let sessions.resolve() make it")


# What is there already


class AlreadyExistsError(HomeAgentError):
    """A `create` or `insert` met a row with the same identity; the row was left as it is."""


class DeviceExistsError(AlreadyExistsError):
    """A device with this id is paired already."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        super().__init__(
            f"device {device_id!r} exists: to pair it anew, delete it first; to change its secret, rotate_secret()"
        )


class AgentExistsError(AlreadyExistsError):
    """An agent with this id exists already."""

    def __init__(self, agent_id: str) -> None:
        self.agent_id = agent_id
        super().__init__(f"agent {agent_id!r} exists: change it with agents.update()")


class SessionExistsError(AlreadyExistsError):
    """A session with this id exists already."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        super().__init__(f"session {session_id!r} exists: touch() it, or index() it from its transcript")


class IdempotencyKeyExistsError(AlreadyExistsError):
    """A live record of this scope exists already."""

    def __init__(self, device_id: str, method: str) -> None:
        self.device_id = device_id
        self.method = method
        super().__init__(
            f"device {device_id!r} has a live record for this key of method {method!r}: find() it and answer from it"
        )


# What the present state forbids


class ConflictError(HomeAgentError):
    """The present state of the store forbids the change; nothing was written.

    Attributes:
        table: the table whose constraint refused the change; None for another conflict, or if it is not known.
        constraint: the name of that constraint, or its columns if it has no name; None if it is not known. SQLite does
            not say which of several foreign keys refused a change.
        kind: the kind of that constraint: `unique` (a primary key too), `foreign_key`, `check`, `not_null`,
            `exclusion` (PostgreSQL) or `datatype` (SQLite, of a STRICT table); None for another conflict.
    """

    table: str | None = None
    constraint: str | None = None
    kind: str | None = None


class AgentInUseError(ConflictError):
    """The agent still has sessions."""

    def __init__(self, agent_id: str, session_count: int) -> None:
        self.agent_id = agent_id
        self.session_count = session_count
        super().__init__(
            f"agent {agent_id!r} has {session_count} session(s): delete them first, or delete_sessions=True"
        )


class LastAdminError(ConflictError):
    """The device is the last approved admin."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        super().__init__(
            f"device {device_id!r} is the last approved admin: approve another admin first, or pass force=True"
        )


class ApprovalChangedError(ConflictError):
    """The device is no longer what the admin saw."""

    def __init__(self, device_id: str, changed: str) -> None:
        self.device_id = device_id
        self.changed = changed
        revoked = ", a revoked device with expected_status=REVOKED or --status revoked" if changed == "status" else ""
        super().__init__(
            f"device {device_id!r} has another {changed} than expected: show it again, then approve it{revoked}"
        )


class DeviceNotApprovedError(ConflictError):
    """An overlap was asked for the secret of a device that is not approved."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        super().__init__(
            f"device {device_id!r} is not approved, so its old secret can't get an overlap: rotate it without one"
        )


class LimitError(ConflictError):
    """There are as many rows of a kind as `limit` allows."""

    def __init__(self, message: str, *, limit: int) -> None:
        self.limit = limit
        super().__init__(message)


class PendingLimitError(LimitError):
    """As many devices wait for their approval as may, so no further device can pair."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit:,} devices wait for their approval: approve or delete some, or raise Limits.pending_devices"
            if limit
            else "pairing is closed: Limits.pending_devices is 0",
            limit=limit,
        )


class NonceLimitError(LimitError):
    """The device has as many live nonces as it may."""

    def __init__(self, device_id: str, limit: int) -> None:
        self.device_id = device_id
        super().__init__(
            f"device {device_id!r} has {limit} live nonces: slow it down; live ones are never evicted, they expire",
            limit=limit,
        )


class TargetNotEmptyError(ConflictError):
    """A store is copied into an empty one only; the target was left as it is."""

    def __init__(self, table: str) -> None:
        self.table = table
        super().__init__(f"the target holds {table} already: name an empty database, or one that doesn't exist yet")


class SourceChangedError(ConflictError):
    """Somebody wrote to the store while it was copied; nothing was copied, since that would have been missing."""

    def __init__(self, table: str) -> None:
        self.table = table
        super().__init__(
            f"{table} of the source was written while it was copied: stop every gateway and sweeper that uses it, "
            "then copy again; or pass live=True (--live) for a trial, to copy what it held at the beginning"
        )


# The idempotency state machine


class IdempotencyError(HomeAgentError):
    """An idempotency key can't be claimed, renewed or recorded now."""

    def __init__(self, message: str, *, device_id: str, method: str) -> None:
        self.device_id = device_id
        self.method = method
        super().__init__(message)


class IdempotencyInProgressError(IdempotencyError):
    """Another caller runs the effect of this key right now (HTTP: 409 with Retry-After).

    `retry_after` says how long its lease still has to run.
    """

    def __init__(self, *, device_id: str, method: str, retry_after: timedelta) -> None:
        self.retry_after = retry_after
        super().__init__(
            f"{method!r} of device {device_id!r} is in progress under this key: "
            f"try again in {max(retry_after.total_seconds(), 0):.3f} s",
            device_id=device_id,
            method=method,
        )


class FingerprintMismatchError(IdempotencyError):
    """The key was used before with other parameters (HTTP: 422)."""

    def __init__(self, *, device_id: str, method: str) -> None:
        super().__init__(
            f"this key of {method!r} by device {device_id!r} was used with other parameters: "
            "a new call needs a new key",
            device_id=device_id,
            method=method,
        )


class OutcomeUnknownError(IdempotencyError):
    """An earlier attempt was abandoned; nobody knows whether its effect took place."""

    def __init__(self, *, device_id: str, method: str, attempt: int) -> None:
        self.attempt = attempt
        super().__init__(
            f"attempt {attempt} of {method!r} by device {device_id!r} was abandoned and its outcome is unknown: "
            "find out, then resolve() or forget() the key, or pass on_abandoned",
            device_id=device_id,
            method=method,
        )


class LeaseLostError(IdempotencyError):
    """The attempt is no longer the owner of its key; nothing was changed."""

    def __init__(self, *, device_id: str, method: str, attempt: int) -> None:
        self.attempt = attempt
        super().__init__(
            f"attempt {attempt} of {method!r} by device {device_id!r} no longer owns its key: "
            "another attempt, an operator or a deletion took it; do not act on this attempt's outcome",
            device_id=device_id,
            method=method,
        )


class EffectFailedError(HomeAgentError):
    """Raised by an effect that failed for good: stored, and raised again for every retry of the key.

    Args:
        detail: what to store and replay, any JSON value.
    """

    def __init__(self, detail: JsonValue = None, *, replayed: bool = False) -> None:
        self.detail = detail
        self.replayed = replayed
        super().__init__("the effect failed; .detail says how" + (" (replayed)" if replayed else ""))


class EffectNotStartedError(HomeAgentError):
    """Raised by an effect that did nothing yet: the key is freed, and the next call may run it."""


# The engine and its files


class DatabaseError(HomeAgentError):
    """The engine refused, or its files are not as they must be."""


class DatabaseBusyError(DatabaseError):
    """Another unit holds the database for longer than `busy_timeout`, or retrying reached its deadline."""


class TransientError(DatabaseBusyError):
    """The unit met another unit and was undone; it may succeed if it is run again whole. `Database.run` does that.

    Attributes:
        sqlstate: the code of a PostgreSQL server for the error; None if there is none.
    """

    sqlstate: str | None = None


class ConnectionLostError(DatabaseError):
    """The server went away or can't be reached; nothing of the unit took place."""


class CommitUnknownError(DatabaseError):
    """The connection was lost in the middle of COMMIT: nobody knows whether the unit took place.

    On SQLite: COMMIT failed, and the WAL could not be written either to remove the failed commit from it.

    SQLSTATE 08007 is the standard's name for it, transaction resolution unknown. Look whether what the unit wrote is
    there before you do it again, or make it a unit that may be done twice and pass `idempotent=True` to `Database.run`.
    """


class SchemaTooNewError(DatabaseError):
    """The database was made by a newer version of this package; it was not touched."""

    def __init__(self, revision: str, *, known: str) -> None:
        self.revision = revision
        self.known = known
        super().__init__(
            f"the database is at schema revision {revision!r}, which this version (up to {known!r}) does not know: "
            "upgrade homeagent, or restore a backup made before the database was upgraded"
        )


class SchemaOutdatedError(DatabaseError):
    """The database needs an upgrade and `migrate=False` forbids it, or there is none yet.

    `location` is where it was looked for, a server's without its password; None where there is one.
    """

    def __init__(self, revision: str | None, *, needed: str, location: str | None = None) -> None:
        self.revision = revision
        self.needed = needed
        self.location = location
        where = "" if location is None else f" at {location!r}"
        super().__init__(
            f"there is no database yet{where} (this version needs schema revision {needed!r}): "
            "check the name, or make it with 'homeagent init' or with migrate=True"
            if revision is None
            else f"the database is at schema revision {revision!r} and this version needs {needed!r}: "
            "run 'homeagent migrate', or open it with migrate=True"
        )


class SchemaChangedError(DatabaseError):
    """The schema was changed by other means than homeagent's revisions, so that the rows can't be trusted to it.

    Raised by a restore, a copy and an upgrade; nothing was changed. `changes` has one sentence for each change, with
    the names of the table and of the trigger, index, column or view.
    """

    def __init__(self, changes: list[str], *, location: str, command: str | None) -> None:
        self.changes = changes
        self.location = location
        shown = "; ".join(changes[:10]) + ("; …" if len(changes) > 10 else "")
        first = "" if command is None else f" (the first step is: {command})"
        super().__init__(
            f"the schema of {location} was changed by hand: {shown}. Undo the change{first}, then try again; of a "
            "backup, undo it in a copy of the file and restore the copy. Nothing was changed"
        )


class MigrationError(DatabaseError):
    """An upgrade failed and was rolled back; the database has the schema it had before.

    `backup` is the copy made before the upgrade, or None where there was nothing to copy.
    """

    def __init__(self, message: str, *, backup: Path | None = None) -> None:
        self.backup = backup
        super().__init__(message)


class ForeignAccessError(DatabaseError):
    """Another SQLite library in this process has, or wants, the file that is open as a database."""


class ForeignDatabaseError(DatabaseError):
    """The file or schema belongs to another application; it was not touched."""


class CorruptDatabaseError(DatabaseError):
    """The file is no sound database: it was not touched, and it is never read as empty."""


class DatabaseMovedError(CorruptDatabaseError):
    """The file, or its log, was deleted, moved or replaced while it was open; nothing of the unit took place.

    Work goes on by itself once the file that was opened is back under its name. Another file is only taken by a
    database that is opened anew.
    """


class InsecureFileError(DatabaseError):
    """A file or directory is not private, or is a link: who else can write it could open the door."""


class DiskFullError(DatabaseError):
    """There was no room to write; the unit was rolled back and work goes on once there is."""


class DatabaseIOError(DatabaseError):
    """The operating system could not read or write a file of the database; the unit was rolled back.

    Work goes on by itself once it can. A disk that is failing says so in the system's log.
    """


class TooManyFilesError(DatabaseError):
    """The process or the machine may open no more files; the unit was rolled back and work goes on once it may."""


class ReadOnlyError(DatabaseError):
    """The database, its file system or this unit of work can only be read."""


class StandbyError(ReadOnlyError):
    """The server takes no writes: it is a standby, or a primary that was demoted.

    `Database.run` looks for another server and does the unit again.
    """

    def __init__(self) -> None:
        super().__init__(
            "the PostgreSQL server is a standby and takes no writes: name all hosts in the URL, with "
            "target_session_attrs=read-write, so that the primary is found"
        )


class BackupStoppedError(DatabaseError):
    """The backup was told to stop before it was whole; nothing of it was kept."""


class DatabaseClosedError(DatabaseError):
    """The database was closed, or was opened before this process was forked: open it again."""
