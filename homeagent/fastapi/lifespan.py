from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import timedelta
from os import PathLike
from typing import Annotated, Any, TypeVar

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from sqlalchemy import URL
from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from homeagent import maintenance
from homeagent.database import Database
from homeagent.engine.target import conceal
from homeagent.errors import DatabaseError, InvalidArgumentError, UnitStateError
from homeagent.fastapi.problems import HTTPProblem

App = TypeVar("App", bound=Starlette)


def lifespan(
    target: str | PathLike[str] | URL | Database | None = None,
    *,
    then: Callable[[App], AbstractAsyncContextManager[Any]] | None = None,
    sweep_every: timedelta | None = timedelta(minutes=5),
    backups: maintenance.BackupSchedule | None = None,
    **options: Any,
) -> Callable[[App], AbstractAsyncContextManager[Any]]:
    """Return a lifespan for the argument `lifespan=` of FastAPI. Each worker process opens the database at its start.

    Args:
        target: path or URL of the database, or an open `Database` object. The lifespan does not close a given
            `Database` object.
        then: lifespan of the application, which runs while the database is open. In the application's lifespan,
            `app.state.homeagent_database` is the database.
        sweep_every: time between two sweeps in the background. With `sweep_every=None`, the lifespan does not sweep.
        backups: schedule of the backups, which the lifespan makes after a sweep. See `Database.sweeper()`.
        options: arguments of `Database.open`, such as `unit=`. If the target is an open database, the options have no
            effect.

    Raises:
        InvalidArgumentError: if a schedule of backups is given with `sweep_every=None`.

    Raises (when the server starts):
        InvalidArgumentError: if `sweep_every` or `backups` is invalid, for example if `backups` is a path.
        DatabaseClosedError: if the target was opened before the server forked the worker process.
    """
    if backups is not None and sweep_every is None:
        raise InvalidArgumentError("backups= needs sweep_every=: the lifespan makes a backup after a sweep")
    given: Any = target if isinstance(target, Database) else conceal(target)
    del target

    @asynccontextmanager
    async def run(app: App) -> AsyncIterator[Any]:
        database = given if isinstance(given, Database) else await run_sync(lambda: Database.open(given, **options))
        try:
            # If the database was opened before a fork, `ping()` raises an error. Without `ping()`, the server would
            # start, and each request would fail.
            await run_sync(database.ping)
            app.state.homeagent_database = database
            with nullcontext() if sweep_every is None else database.sweeper(sweep_every, backups=backups):
                async with nullcontext() if then is None else then(app) as state:
                    yield state
        finally:
            if database is not given:
                with anyio.CancelScope(shield=True):
                    await run_sync(database.close)

    return run


async def get_database(connection: HTTPConnection) -> Database:
    """Return the open database of the application. If the application runs without its lifespan, raise UnitStateError.
    Tests can replace the dependency by FastAPI's `app.dependency_overrides`.
    """
    database: Database | None = getattr(connection.app.state, "homeagent_database", None)
    if database is None:
        raise UnitStateError(
            "the application has no open database: pass FastAPI(lifespan=homeagent.fastapi.lifespan(…)), and run a "
            "TestClient in a with block. Starlette does not run the lifespan of a mounted application: set "
            "state.homeagent_database of the mounted application to the open database"
        )
    return database


DatabaseDep = Annotated[Database, Depends(get_database)]
"""Dependency: the open database of the application."""

health_router: APIRouter = APIRouter()
"""Router with `GET /health`. The status is 200 if the database answers, else 503."""


@health_router.get("/health")
def health(database: DatabaseDep) -> JSONResponse:
    """Return status 200 if the database answers, or else status 503."""
    try:
        database.ping()
    except DatabaseError as error:
        raise HTTPProblem(error, 503, "The database does not answer.") from error
    return JSONResponse({"status": "ok"})
