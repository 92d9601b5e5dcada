"""Open a database, and create or upgrade its schema."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from functools import partial
from os import PathLike

from sqlalchemy import MetaData

from homeagent.clock import Clock, system_clock
from homeagent.engine.engine import Engine
from homeagent.engine.files.directories import prepare_directory
from homeagent.engine.files.filesystems import refuse_network_filesystem
from homeagent.engine.sqlite.engine import SQLiteEngine
from homeagent.engine.target import Given, resolve_target
from homeagent.environment import BUSY_TIMEOUT, MAX_POOL_SIZE, Durability, durability_or_default, pool_size_or_default
from homeagent.errors import InvalidArgumentError
from homeagent.migrations.application import Application
from homeagent.migrations.sqlite import open_sqlite
from homeagent.models.types import check_flag


def open_engine(
    target: Given,
    *,
    clock: Clock = system_clock,
    busy_timeout: timedelta = BUSY_TIMEOUT,
    durability: Durability = "full",
    migrate: bool = True,
    pool_size: int = 1,
    migrations: str | PathLike[str] | Application | None = None,
    metadata: Sequence[MetaData] = (),
    acknowledged: Collection[str] = (),
) -> Engine:
    """Open a SQLite file or a PostgreSQL database (see `Database.open`)."""
    durability, pool_size = durability_or_default(durability), pool_size_or_default(pool_size)
    if type(pool_size) is not int or not 1 <= pool_size <= MAX_POOL_SIZE:
        raise InvalidArgumentError(f"pool_size must be a whole number from 1 to {MAX_POOL_SIZE:,}")
    check_flag(migrate, "migrate")
    application = Application.of(migrations, acknowledged)
    if not isinstance(metadata, Collection) or not all(isinstance(one, MetaData) for one in metadata):
        raise InvalidArgumentError("metadata must be a list of MetaData objects, such as [SQLModel.metadata]")
    where = resolve_target(target)
    engine: Engine
    if where.url is not None:
        from homeagent.engine.postgresql.engine import PostgreSQLEngine
        from homeagent.migrations.postgresql import open_postgresql

        engine = server = PostgreSQLEngine(where.url, busy_timeout=busy_timeout, pool_size=pool_size)
        prepare = partial(open_postgresql, server, migrate=migrate)
    else:
        if where.path is None:
            file = SQLiteEngine.temporary(busy_timeout=busy_timeout, durability=durability)
        else:
            if migrate:
                prepare_directory(where.path.parent)
                refuse_network_filesystem(where.path)
            file = SQLiteEngine(where.path, busy_timeout=busy_timeout, durability=durability)
        engine = file
        prepare = partial(
            open_sqlite, file, clock=clock, migrate=migrate or where.is_temporary, temporary=where.is_temporary
        )
    engine.application_metadata = tuple(metadata)
    engine.acknowledged = application.acknowledged
    try:
        prepare(timeout=busy_timeout, application=application)
    except BaseException:
        engine.close()
        raise
    return engine
