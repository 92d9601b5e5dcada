"""The reply of an application to each error, and the description of the replies in the OpenAPI document."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Annotated, Any, Literal

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from homeagent import errors
from homeagent.fastapi import ErrorReply, install_error_handlers
from tests.asgi import Client

CALL = {"device_id": "d-private", "method": "door.open"}
ANSWERS: list[tuple[errors.HomeAgentError, int, str | None]] = [
    (errors.AuthenticationError("private"), 401, None),
    (errors.AccessDeniedError("private"), 403, None),
    (errors.DeviceNotFoundError("d-private"), 404, None),
    (errors.AgentNotFoundError("a-private"), 404, None),
    (errors.SessionNotFoundError("s-private"), 404, None),
    (errors.DeviceExistsError("d-private"), 409, None),
    (errors.IdempotencyKeyExistsError("d-private", "door.open"), 409, None),
    (errors.AgentInUseError("a-private", 3), 409, None),
    (errors.LastAdminError("d-private"), 409, None),
    (errors.ApprovalChangedError("d-private", "role"), 409, None),
    (errors.DeviceNotApprovedError("d-private"), 409, None),
    (errors.NonceLimitError("d-private", 10), 409, None),
    (errors.PendingLimitError(10), 409, None),
    (errors.IdempotencyInProgressError(**CALL, retry_after=timedelta(seconds=1, milliseconds=1)), 409, "2"),
    (errors.IdempotencyInProgressError(**CALL, retry_after=timedelta(seconds=-1)), 409, "0"),
    (errors.OutcomeUnknownError(**CALL, attempt=1), 409, None),
    (errors.LeaseLostError(**CALL, attempt=1), 409, None),
    (errors.FingerprintMismatchError(**CALL), 422, None),
    (errors.InvalidArgumentError("/srv/private.db names a directory"), 422, None),
    (errors.HandshakeError("private"), 400, None),
    (errors.EffectFailedError({"jammed": True}), 422, None),
    (errors.EffectNotStartedError("private"), 503, "1"),
    (errors.TooManyAttemptsError("30 checks failed", retry_after=timedelta(milliseconds=1500)), 429, "2"),
    (errors.DatabaseBusyError("/srv/private.db is busy"), 503, "1"),
    (errors.ConnectionLostError("db.private.example went away"), 503, "1"),
    (errors.DatabaseClosedError("/srv/private.db is closed"), 503, None),
    (errors.DiskFullError("/srv/private.db has no room"), 503, None),
    (errors.CorruptDatabaseError("/srv/private.db"), 500, None),
    (errors.CommitUnknownError("private"), 500, None),
    (errors.UnitStateError("private"), 500, None),
]
# An error class appears twice.
NAMES = [f"{type(error).__name__}-{number}" for number, (error, _, _) in enumerate(ANSWERS)]


def answer_to(error: Exception) -> httpx.Response:
    """Return the response of an application whose only route raises this error."""
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/")
    def fail() -> None:
        raise error

    return Client(app).get("/")


@pytest.mark.parametrize(("error", "status", "retry_after"), ANSWERS, ids=NAMES)
def test_problem_details(error: errors.HomeAgentError, status: int, retry_after: str | None) -> None:
    """Each error gives problem details with its status and its name, in words for the client."""
    response = answer_to(error)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    body = response.json()
    assert set(body) - {"data"} == {"type", "title", "status", "detail", "error"}
    assert (body["status"], body["error"], body["type"]) == (status, type(error).__name__, "about:blank")
    assert body.get("data") == getattr(error, "detail", None)
    assert "private" not in response.text
    assert "homeagent" not in body["detail"]
    assert response.headers.get("retry-after") == retry_after
    assert ("www-authenticate" in response.headers) == (status == 401)


def test_a_server_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """If the server is at fault, the log has the error that the reply does not show."""
    with caplog.at_level(logging.ERROR, "homeagent"):
        answer_to(errors.CorruptDatabaseError("/srv/private.db"))
    (record,) = caplog.records
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "/srv/private.db"


def test_http_exceptions_have_the_same_form() -> None:
    """FastAPI's own errors have the same form and their headers; JSON in `detail` moves to `data`."""
    details: list[tuple[Any, Any]] = [({"pot": 1}, {"pot": 1}), ((1, "é"), [1, "é"]), ({1: "x"}, {"1": "x"})]
    for detail, data in [*details, (float("nan"), None), (object(), None), (["\ud800"], None)]:
        response = answer_to(HTTPException(418, detail, {"X-Pot": "1"}))
        assert (response.status_code, response.headers["x-pot"]) == (418, "1")
        assert (response.json().get("data"), response.json()["error"]) == (data, "HTTPException")
    app = FastAPI()
    install_error_handlers(app)
    assert Client(app).get("/").json()["detail"] == "Not Found"
    assert answer_to(HTTPException(304)).content == b""


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Order(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    count: int


def test_invalid_request_and_document() -> None:
    """A refused request is described without its values, and the OpenAPI document describes all replies."""
    app = FastAPI()

    @app.post("/", responses={404: {"model": ErrorReply}})
    def order(order: Order) -> None: ...

    install_error_handlers(app)
    response = Client(app).post("/", json={"pet": {"kind": "private"}, "count": "private"})
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert [line["loc"] for line in response.json()["errors"]] == [["body", "pet"], ["body", "count"]]
    assert response.json()["error"] == "RequestValidationError"
    assert "private" not in response.text

    @app.post("/counts")
    def count(counts: dict[str, int]) -> None: ...

    counts = Client(app).post("/counts", json={"chosen": "private"})
    assert (counts.json()["errors"][0]["loc"], "private" in counts.text) == (["body", "chosen"], False)

    for _ in range(2):
        document = Client(app).get("/openapi.json").json()
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
    responses = document["paths"]["/"]["post"]["responses"]
    assert {status: reply["content"] for status, reply in responses.items() if status != "200"} == dict.fromkeys(
        ("404", "422", "default"), content
    )
    assert {"ErrorReply", "InvalidValue"} <= set(document["components"]["schemas"])
    assert "ValidationError" not in str(document)

    @app.webhooks.post("ordered")
    def ordered(order: Order) -> None: ...

    app.openapi_schema = None
    assert {"HTTPValidationError", "ValidationError"} <= set(app.openapi()["components"]["schemas"])
