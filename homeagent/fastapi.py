"""Glue for FastAPI applications, the extra `homeagent[fastapi]`: errors become replies that give no secret away."""

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
"""What a busy database tells a caller to wait, in seconds."""


class ErrorReply(BaseModel):
    """What a refused request is answered with.

    Attributes:
        error: the name of the error's class in `homeagent.errors`.
        detail: its message, which names the remedy.
    """

    error: str = Field(description="The name of the error.")
    detail: str = Field(description="What was refused, and what to do about it.")


def error_replies(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses=` of a route that may answer with these statuses, for the OpenAPI document."""
    return {status: {"model": ErrorReply} for status in statuses}


def install_error_handlers(app: FastAPI) -> None:
    """Have an application answer the errors of this package.

    | error | status |
    |---|---|
    | `NotFoundError` | 404 |
    | `AlreadyExistsError`, `ConflictError`, `IdempotencyError` | 409 |
    | `InvalidArgumentError`, `FingerprintMismatchError`, FastAPI's `RequestValidationError` | 422 |
    | `TooManyAttemptsError` | 429 |
    | `DatabaseBusyError`, `ConnectionLostError`, `DatabaseClosedError`, `DiskFullError` | 503 |

    `IdempotencyInProgressError`, `TooManyAttemptsError`, `DatabaseBusyError` and `ConnectionLostError` carry a
    Retry-After (RFC 9110, section 10.2.3). A 422 of FastAPI echoes the input, which may be a secret: here it says where
    and why, and no more. Every other error stays what it is, a 500: it speaks of the server and not of the request.

    Args:
        app: the application; handlers that it has for these errors are replaced.
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


# Coroutines, since Starlette would run plain functions in the thread pool, which may be full just then.


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
    assert isinstance(error, TooManyAttemptsError)  # noqa: S101  what it is installed for
    return _reply(429, error, str(error), _seconds(error))


def _seconds(error: IdempotencyInProgressError | TooManyAttemptsError) -> int:
    # Whole seconds, rounded up: a caller who comes too early is refused again.
    return max(0, math.ceil(error.retry_after.total_seconds()))


async def _answer_422(request: Request, error: Exception) -> JSONResponse:
    return _reply(422, error, str(error))


async def _answer_argument(request: Request, error: Exception) -> JSONResponse:
    # In FastAPI's own form, so that every refused argument reads the same.
    return JSONResponse({"detail": [{"type": "value_error", "loc": [], "msg": str(error)}]}, status_code=422)


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101  what it is installed for
    lines = [{name: line[name] for name in ("type", "loc", "msg")} for line in error.errors()]
    return JSONResponse({"detail": lines}, status_code=422)


async def _answer_503(request: Request, error: Exception) -> JSONResponse:
    # The message may name a file of the server, which is nothing to a caller.
    assert isinstance(error, HomeAgentError)  # noqa: S101  what it is installed for
    # Not so a commit that nobody knows about, which is a 500: whoever asks again has to know whether that may be.
    busy = isinstance(error, (DatabaseBusyError, ConnectionLostError))
    detail = "the database is busy: try again" if busy else "the database can't be used now"
    return _reply(503, error, detail, _RETRY_AFTER if busy else None)
