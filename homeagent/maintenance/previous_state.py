"""What a restore has to know of the database that was there, whatever is left of it."""

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
    """The epoch, 0 where there was none or it can't be told, and the devices, None where they can't be told."""

    epoch: int
    devices: Devices | None


def read_previous_state(database: Path) -> PreviousState:
    """Ask the old database, through a copy: SQLite would put its log into it and remove that, when it closes it."""
    if not os.path.lexists(database):
        return PreviousState(0, None)
    copy = database.with_name(f"{database.name}.before.restoring")
    discard(copy)
    epoch = 0
    try:
        for original, made in zip((database, *sidecars(database)), (copy, *sidecars(copy)), strict=True):
            if os.path.lexists(original) and not original.name.endswith("-shm"):
                copy_file(original, made, database=database)
        with closing(connect(str(copy))) as raw:
            raw.execute("PRAGMA trusted_schema=OFF")
            with suppress(*DRIVER_ERRORS, TypeError, ValueError):  # damaged, or older than the epochs
                epoch = int(raw.execute("SELECT epoch FROM store").get)
            return PreviousState(epoch, devices_of(raw))
    except (*DRIVER_ERRORS, DatabaseError, TypeError, ValueError):  # a disk that can't read it, or has no room
        return PreviousState(epoch, None)
    finally:
        discard(copy)
