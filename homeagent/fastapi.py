"""Support for FastAPI (extra `homeagent[fastapi]`): error handlers whose replies do not show secrets."""

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
"""The Retry-After of a busy database, in seconds."""


class ErrorReply(BaseModel):
    """The body of an error reply."""

    error: str = Field(description="Name of the error's class in homeagent.errors.")
    detail: str = Field(description="Message of the error: reason and remedy.")


def error_replies(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the argument `responses=` of a route with these error statuses, for the OpenAPI document."""
    return {status: {"model": ErrorReply} for status in statuses}


def install_error_handlers(app: FastAPI) -> None:
    """Install handlers in an application that turn homeagent's errors into replies.

    | error | status |
    |---|---|
    | `NotFoundError` | 404 |
    | `AlreadyExistsError`, `ConflictError`, `IdempotencyError` | 409 |
    | `InvalidArgumentError`, `FingerprintMismatchError`, FastAPI's `RequestValidationError` | 422 |
    | `TooManyAttemptsError` | 429 |
    | `DatabaseBusyError`, `ConnectionLostError`, `DatabaseClosedError`, `DiskFullError` | 503 |

    The replies to `IdempotencyInProgressError`, `TooManyAttemptsError`, `DatabaseBusyError` and `ConnectionLostError`
    have a Retry-After (RFC 9110, section 10.2.3). FastAPI's own 422 repeats the input, which may be a secret; this 422
    has only place and reason. Other errors concern the server, and stay a 500.

    Args:
        app: the application. Its existing handlers for these errors are replaced.
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


# Do not make the handlers plain functions: Starlette would run them in the thread pool, which may be full.


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
    # Round up to whole seconds: an early retry would be refused again.
    return max(0, math.ceil(error.retry_after.total_seconds()))


async def _answer_422(request: Request, error: Exception) -> JSONResponse:
    return _reply(422, error, str(error))


async def _answer_argument(request: Request, error: Exception) -> JSONResponse:
    # FastAPI's format, so that all replies for invalid arguments are alike.
    return JSONResponse({"detail": [{"type": "value_error", "loc": [], "msg": str(error)}]}, status_code=422)


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101  the only type of this handler
    lines = [{name: line[name] for name in ("type", "loc", "msg")} for line in error.errors()]
    return JSONResponse({"detail": lines}, status_code=422)


async def _answer_503(request: Request, error: Exception) -> JSONResponse:
    # Do not send the message: it may contain the name of a file on the server.
    assert isinstance(error, HomeAgentError)  # noqa: S101  the only type of this handler
    # A commit with unknown outcome is not here but a 500: only the application knows whether a retry is safe.
    busy = isinstance(error, (DatabaseBusyError, ConnectionLostError))
    detail = "the database is busy: try again" if busy else "the database is not available now"
    return _reply(503, error, detail, _RETRY_AFTER if busy else None)
