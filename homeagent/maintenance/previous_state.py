"""Read the epoch and the devices of the old database before a restore, if the old database is readable."""

from __future__ import annotations

import os
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from homeagent.engine.files.database_file import sidecars
from homeagent.engine.sqlite.backup import discard
from homeagent.engine.sqlite.dialect import DRIVER_ERRORS, connect
from homeagent.errors import DatabaseError
from homeagent.maintenance.staging import Devices, copy_file, devices_of

__all__ = ["PreviousState", "read_previous_state"]


@dataclass(frozen=True, slots=True)
class PreviousState:
    """Epoch and devices of the old database. If the epoch is unknown, it is 0. If the devices are unknown, they are
    None.
    """

    epoch: int
    devices: Devices | None


def read_previous_state(database: Path) -> PreviousState:
    """Read a copy of the old database, because SQLite would checkpoint and remove the original's WAL at close."""
    if not os.path.lexists(database):
        return PreviousState(0, None)
    copy = database.with_name(f"{database.name}.before.restoring")
    discard(copy)
    epoch = 0
    try:
        for original, target in zip((database, *sidecars(database)), (copy, *sidecars(copy)), strict=True):
            if os.path.lexists(original) and not original.name.endswith("-shm"):
                copy_file(original, target, database=database)
        with closing(connect(str(copy))) as raw:
            raw.execute("PRAGMA trusted_schema=OFF")
            with suppress(*DRIVER_ERRORS, TypeError, ValueError):  # the file is damaged, or its revision has no epoch
                epoch = int(raw.execute("SELECT epoch FROM store").get)
            return PreviousState(epoch, devices_of(raw))
    except (*DRIVER_ERRORS, DatabaseError, TypeError, ValueError):  # the database is damaged, or the disk failed
        return PreviousState(epoch, None)
    finally:
        discard(copy)
