"""Convert errors to problem details (RFC 9457). Only operators see an error's message, which can contain paths."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.utils import is_body_allowed_for_status_code
from pydantic import BaseModel, Field, JsonValue
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.websockets import WebSocketState

from homeagent import errors
from homeagent.errors import HomeAgentError

logger: logging.Logger = logging.getLogger("homeagent")

PROBLEM = "application/problem+json"

CHALLENGE = 'Bearer realm="homeagent", Basic realm="homeagent", charset="UTF-8"'
"""Value of the header WWW-Authenticate (RFC 9110, section 11.6.1)."""

REQUIRED_KEY = "Required key of the call, the same in each retry."
"""Description of the header Idempotency-Key that a request must have."""

_RETRY_AFTER = 1
"""Value of the header Retry-After, in seconds, for errors without a known time."""

# HTTP status and text of the reply. A class without an entry has the entry of its base class.
_ANSWERS: dict[type[BaseException], tuple[int, str]] = {
    HomeAgentError: (500, "The server could not handle the request."),
    errors.InvalidArgumentError: (422, "A value in the request is not allowed."),
    errors.AuthenticationError: (401, "The credentials are absent or wrong."),
    errors.AccessDeniedError: (403, "The device has no access."),
    errors.HandshakeError: (400, "The handshake failed."),
    errors.NotFoundError: (404, "The object does not exist."),
    errors.DeviceNotFoundError: (404, "The device does not exist."),
    errors.AgentNotFoundError: (404, "The agent does not exist."),
    errors.SessionNotFoundError: (404, "The session does not exist."),
    errors.AlreadyExistsError: (409, "The object exists already."),
    errors.DeviceExistsError: (409, "A device with this id exists already."),
    errors.AgentExistsError: (409, "An agent with this id exists already."),
    errors.SessionExistsError: (409, "A session with this id exists already."),
    errors.ConflictError: (409, "The present state of the data does not allow the change."),
    errors.AgentInUseError: (409, "The agent still has sessions."),
    errors.LastAdminError: (409, "The device is the last approved administrator."),
    errors.ApprovalChangedError: (409, "The device has changed since it was shown: read the device again."),
    errors.DeviceNotApprovedError: (409, "The device is not approved."),
    # Ask for a new request. A retry would get the stored reply.
    errors.LimitError: (409, "The maximum number of stored objects of this kind is reached: send a new request later."),
    errors.PendingLimitError: (409, "Too many devices wait for approval: send a new request later."),
    errors.TooManyAttemptsError: (429, "Too many attempts: try again later."),
    errors.IdempotencyError: (409, "The idempotency key can't be used now."),
    errors.IdempotencyInProgressError: (409, "A request with this idempotency key is in progress: try again later."),
    errors.FingerprintMismatchError: (422, "This idempotency key was used for another request: send a new key."),
    errors.OutcomeUnknownError: (409, "It is unknown whether the first request with this idempotency key took effect."),
    errors.LeaseLostError: (409, "It is unknown whether the request took effect: another request took over its key."),
    errors.EffectFailedError: (422, "The effect failed, and fails again with the same idempotency key."),
    errors.EffectNotStartedError: (503, "The effect did not begin: try again later."),
    errors.DatabaseBusyError: (503, "The database is busy: try again later."),
    errors.ConnectionLostError: (503, "The database is busy: try again later."),
    errors.DatabaseClosedError: (503, "The database is not available now."),
    errors.DiskFullError: (503, "The database is not available now."),
}
_RETRYABLE = (errors.DatabaseBusyError, errors.ConnectionLostError, errors.EffectNotStartedError)


class InvalidValue(BaseModel):
    """Description of an invalid value in a request. The reply does not show the value itself."""

    type: str = Field(description="Pydantic's name of the kind of error.")
    loc: list[str | int] = Field(
        description="Place of the value in the request. The place can contain keys that the client chose."
    )
    msg: str = Field(description="Reason of the refusal.")


class ErrorReply(BaseModel):
    """Body of each error reply (problem details, RFC 9457). The OpenAPI document describes the body as the default
    reply of each route. To list a status, pass `responses={404: {"model": ErrorReply}}` to FastAPI's route.
    """

    type: str = Field(default="about:blank", description="Always `about:blank`: `error` names the kind of error.")
    title: str = Field(description="Name of the status.")
    status: int = Field(description="HTTP status.")
    detail: str = Field(description="Reason, for the client.")
    error: str = Field(description="Name of the error's class, for homeagent's errors that of homeagent.errors.")
    errors: list[InvalidValue] | None = Field(default=None, description="Values of the request that were refused.")
    data: JsonValue = Field(default=None, description="The application's own description of the failure.")


class HTTPProblem(HTTPException):
    """HTTPException for an error of homeagent. FastAPI can answer an HTTPProblem even without homeagent's handlers."""

    reply: ErrorReply

    def __init__(self, error: HomeAgentError, status: int | None = None, detail: str | None = None) -> None:
        self.reply, headers = _problem_of(error)
        if status is not None:
            self.reply.status, self.reply.title = status, _title(status)
        if detail is not None:
            self.reply.detail = detail
        super().__init__(self.reply.status, self.reply.detail, headers)


def as_http(error: HomeAgentError) -> Exception:
    """Return the error as an `HTTPProblem`. Return an error with status 500 unchanged, for the server's log."""
    return error if _answer_for(error)[0] == 500 else HTTPProblem(error)


def problem_response(error: Exception) -> Response:
    """Return the reply for a HomeAgentError, an HTTPException or a RequestValidationError. If HTTP does not allow a
    body for the status, the reply has no body.
    """
    if isinstance(error, HTTPProblem):
        reply, headers = error.reply, dict(error.headers or {})
    else:
        reply, headers = _problem_of(error)
    if not is_body_allowed_for_status_code(reply.status):
        return Response(status_code=reply.status, headers=headers)
    content = reply.model_dump(mode="json", exclude_none=True)
    return JSONResponse(content, reply.status, headers, media_type=PROBLEM)


def _answer_for(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the text for the client. The argument `error=` must be a HomeAgentError."""
    return next(_ANSWERS[kind] for kind in type(error).__mro__ if kind in _ANSWERS)


def _title(status: int) -> str:
    """Return the standard phrase for an HTTP status, or else "Error"."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _problem_of(error: Exception) -> tuple[ErrorReply, dict[str, str]]:
    """Return the body and the headers of the reply for an error."""
    headers: dict[str, str] = {}
    invalid: list[InvalidValue] | None = None
    data: JsonValue = None
    if isinstance(error, RequestValidationError):
        status, detail = 422, "The request is invalid."
        invalid = [InvalidValue(type=each["type"], loc=list(each["loc"]), msg=_reason(each)) for each in error.errors()]
    elif isinstance(error, StarletteHTTPException):
        headers.update(error.headers or {})
        given: Any = error.detail  # FastAPI's HTTPException accepts any JSON value as the detail
        status, detail = error.status_code, given if isinstance(given, str) else _title(error.status_code)
        data = None if isinstance(given, str) else json_of(given)
    else:
        status, detail = _answer_for(error)
    if isinstance(error, (errors.IdempotencyInProgressError, errors.TooManyAttemptsError)):
        # Round up, so that a retry is not too early.
        headers["Retry-After"] = str(max(0, math.ceil(error.retry_after.total_seconds())))
    elif isinstance(error, _RETRYABLE):
        headers["Retry-After"] = str(_RETRY_AFTER)
    elif isinstance(error, errors.AuthenticationError):
        headers["WWW-Authenticate"] = CHALLENGE
    elif isinstance(error, errors.EffectFailedError):
        data = json_of(error.detail)
        if error.replayed:
            headers["Idempotency-Replayed"] = "true"
    name = type(error).__name__
    reply = ErrorReply(title=_title(status), status=status, detail=detail, error=name, errors=invalid, data=data)
    return reply, headers


def json_of(detail: Any) -> Any:
    """Convert the detail to JSON, and return the decoded JSON. If the conversion fails, return None."""
    # Do not raise an error. Otherwise a refusal would have status 500, and the key of an effect would stay in progress.
    try:
        return from_json(to_json(detail, inf_nan_mode="null"))
    except ValueError:
        return None


def _reason(line: Mapping[str, Any]) -> str:
    # Only Pydantic's message for `union_tag_invalid` repeats the input. Replace the message.
    return "Input tag is not one of the expected tags" if line["type"] == "union_tag_invalid" else str(line["msg"])


def install_error_handlers(app: FastAPI) -> None:
    """Install error handlers, which turn errors into problem details (`ErrorReply`).

    | error | status |
    |---|---|
    | `HandshakeError` | 400 |
    | `AuthenticationError`, `AccessDeniedError` | 401, 403 |
    | `NotFoundError` | 404 |
    | `AlreadyExistsError`, `ConflictError`, `IdempotencyError` | 409 |
    | `InvalidArgumentError`, `FingerprintMismatchError`, `EffectFailedError`, `RequestValidationError` | 422 |
    | `TooManyAttemptsError` | 429 |
    | other errors of homeagent, which are logged | 500 |
    | `DatabaseBusyError` with its subclass `TransientError` | 503 |
    | `ConnectionLostError`, `EffectNotStartedError` | 503 |
    | `DatabaseClosedError`, `DiskFullError` | 503 |

    For a temporary error, the reply has the header Retry-After (RFC 9110, section 10.2.3). The header is the shortest
    time to wait before a retry. The retry can fail again. The function replaces the handlers for homeagent's errors,
    `HTTPException` and `RequestValidationError`. FastAPI's own reply for a RequestValidationError repeats the input.
    The input can be a secret.
    """
    # With Starlette's types, requests and WebSockets would need separate handlers.
    answer: Any = _answer
    for kind in (HomeAgentError, StarletteHTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(WebSocketDisconnect, _ignore)
    original = app.openapi
    app.openapi = lambda: _document_problems(original())  # type: ignore[method-assign]  # FastAPI documents this way


# Do not remove the keyword `async`. Otherwise Starlette would use the thread pool, which can be full.
async def _answer(connection: Request | WebSocket, error: Exception) -> Response | None:
    response = problem_response(error)
    if response.status_code == 500 and isinstance(error, HomeAgentError):
        logger.error(
            "a request failed: %s",
            type(error).__name__,
            exc_info=error,
            extra={"event": "request_failed", "error": type(error).__name__},
        )
    if isinstance(connection, WebSocket) and connection.application_state is not WebSocketState.CONNECTING:
        if connection.application_state is WebSocketState.CONNECTED:
            await connection.close(1011)
        return None
    return response


async def _ignore(connection: Request | WebSocket, error: Exception) -> None:
    """Ignore a WebSocketDisconnect. Otherwise the server would log the exception."""


def _document_problems(document: dict[str, Any]) -> dict[str, Any]:
    """Describe the problem details in an OpenAPI document. A second call does not change the document."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schema = ErrorReply.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update({**schema.pop("$defs"), "ErrorReply": schema})
    reference = {"$ref": "#/components/schemas/ErrorReply"}
    replaced = (reference, {"$ref": "#/components/schemas/HTTPValidationError"})
    operations = [each for path in document.get("paths", {}).values() for each in path.values()]
    for operation in [each for each in operations if isinstance(each, dict) and "responses" in each]:
        for parameter in operation.get("parameters", ()):
            if parameter.get("description") == REQUIRED_KEY:
                parameter["required"] = True
        responses = operation["responses"]
        for response in responses.values():
            content = response.get("content", {})
            if content.get("application/json", {}).get("schema") in replaced:
                del content["application/json"]
                content[PROBLEM] = {"schema": reference}
        responses.setdefault("default", {"description": "Error", "content": {PROBLEM: {"schema": reference}}})
    # The replies to callbacks and webhooks refer to FastAPI's schemas. Otherwise remove the schemas.
    for name in ("HTTPValidationError", "ValidationError"):
        if f"'#/components/schemas/{name}'" not in str(document):
            schemas.pop(name, None)
    return document
