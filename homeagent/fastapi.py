"""Error handlers for FastAPI, whose replies do not show secrets. Install the extra `homeagent[fastapi]`."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from homeagent.errors import (
    AlreadyExistsError,
    ConflictError,
    ConnectionLostError,
    DatabaseBusyError,
    DatabaseClosedError,
    DiskFullError,
    FingerprintMismatchError,
    HomeAgentError,
    IdempotencyError,
    IdempotencyInProgressError,
    InvalidArgumentError,
    NotFoundError,
    TooManyAttemptsError,
)

__all__ = ["ErrorReply", "error_replies", "install_error_handlers"]

_RETRY_AFTER = 1
"""Value of the header Retry-After in the reply for a busy database, in seconds."""


class ErrorReply(BaseModel):
    """The body of an error reply."""

    error: str = Field(description="Name of the error's class in homeagent.errors.")
    detail: str = Field(description="Message of the error: reason and remedy.")


def error_replies(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the argument `responses=` of a FastAPI route. The OpenAPI document then lists these error statuses."""
    return {status: {"model": ErrorReply} for status in statuses}


def install_error_handlers(app: FastAPI) -> None:
    """Install error handlers in an application. The handlers turn homeagent's errors into replies.

    | error | status |
    |---|---|
    | `NotFoundError` | 404 |
    | `AlreadyExistsError`, `ConflictError`, `IdempotencyError` | 409 |
    | `InvalidArgumentError`, `FingerprintMismatchError`, FastAPI's `RequestValidationError` | 422 |
    | `TooManyAttemptsError` | 429 |
    | `DatabaseBusyError`, `ConnectionLostError`, `DatabaseClosedError`, `DiskFullError` | 503 |

    The replies for `IdempotencyInProgressError`, `TooManyAttemptsError`, `DatabaseBusyError` and `ConnectionLostError`
    have the header Retry-After (RFC 9110, section 10.2.3). FastAPI's own reply with status 422 repeats the input, which
    can be a secret. The reply of these handlers has only the place and the reason of the error. Other errors still have
    status 500.

    Args:
        app: the application. Existing handlers of the application for these errors are replaced.
    """
    for kind, handler in {
        NotFoundError: _answer_404,
        AlreadyExistsError: _answer_409,
        ConflictError: _answer_409,
        IdempotencyError: _answer_409,
        InvalidArgumentError: _answer_argument,
        FingerprintMismatchError: _answer_422,
        RequestValidationError: _answer_validation,
        TooManyAttemptsError: _answer_429,
        DatabaseBusyError: _answer_503,
        ConnectionLostError: _answer_503,
        DatabaseClosedError: _answer_503,
        DiskFullError: _answer_503,
    }.items():
        app.add_exception_handler(kind, handler)


# Do not make the handlers plain functions. Starlette would run plain functions in the thread pool, which can be full.


def _reply(status: int, error: Exception, detail: str, retry_after: int | None = None) -> JSONResponse:
    content = ErrorReply(error=type(error).__name__, detail=detail).model_dump()
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(content, status_code=status, headers=headers)


async def _answer_404(request: Request, error: Exception) -> JSONResponse:
    return _reply(404, error, str(error))


async def _answer_409(request: Request, error: Exception) -> JSONResponse:
    retry_after = _seconds(error) if isinstance(error, IdempotencyInProgressError) else None
    return _reply(409, error, str(error), retry_after)


async def _answer_429(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TooManyAttemptsError)  # noqa: S101  the only type of this handler
    return _reply(429, error, str(error), _seconds(error))


def _seconds(error: IdempotencyInProgressError | TooManyAttemptsError) -> int:
    # Round up to whole seconds, because an early retry would be refused again.
    return max(0, math.ceil(error.retry_after.total_seconds()))


async def _answer_422(request: Request, error: Exception) -> JSONResponse:
    return _reply(422, error, str(error))


async def _answer_argument(request: Request, error: Exception) -> JSONResponse:
    # Use FastAPI's format, so that all replies for invalid arguments have the same format.
    return JSONResponse({"detail": [{"type": "value_error", "loc": [], "msg": str(error)}]}, status_code=422)


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101  the only type of this handler
    lines = [{name: line[name] for name in ("type", "loc", "msg")} for line in error.errors()]
    return JSONResponse({"detail": lines}, status_code=422)


async def _answer_503(request: Request, error: Exception) -> JSONResponse:
    # Do not send the message of the error, because the message can contain the name of a file on the server.
    assert isinstance(error, HomeAgentError)  # noqa: S101  the only type of this handler
    # CommitUnknownError has status 500, because only the application knows whether a retry is safe.
    busy = isinstance(error, (DatabaseBusyError, ConnectionLostError))
    detail = "the database is busy: try again" if busy else "the database is not available now"
    return _reply(503, error, detail, _RETRY_AFTER if busy else None)
