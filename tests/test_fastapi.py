"""The response of an application to each error of the package."""

from datetime import timedelta

import anyio
import httpx
import pytest
from fastapi import FastAPI

from homeagent import errors
from homeagent.fastapi import install_error_handlers

CALL = {"device_id": "d1", "method": "door.open"}
ANSWERS: list[tuple[errors.HomeAgentError, int, str | None]] = [
    (errors.DeviceNotFoundError("d1"), 404, None),
    (errors.AgentNotFoundError("a1"), 404, None),
    (errors.SessionNotFoundError("s1"), 404, None),
    (errors.DeviceExistsError("d1"), 409, None),
    (errors.IdempotencyKeyExistsError("d1", "door.open"), 409, None),
    (errors.AgentInUseError("a1", 3), 409, None),
    (errors.LastAdminError("d1"), 409, None),
    (errors.ApprovalChangedError("d1", "role"), 409, None),
    (errors.DeviceNotApprovedError("d1"), 409, None),
    (errors.NonceLimitError("d1", 10), 409, None),
    (errors.IdempotencyInProgressError(**CALL, retry_after=timedelta(seconds=1, milliseconds=1)), 409, "2"),
    (errors.IdempotencyInProgressError(**CALL, retry_after=timedelta(seconds=-1)), 409, "0"),
    (errors.OutcomeUnknownError(**CALL, attempt=1), 409, None),
    (errors.FingerprintMismatchError(**CALL), 422, None),
    (errors.TooManyAttemptsError("30 checks failed", retry_after=timedelta(milliseconds=1500)), 429, "2"),
    (errors.DatabaseBusyError("/srv/private.db is busy"), 503, "1"),
    (errors.ConnectionLostError("db.private.example went away"), 503, "1"),
    (errors.DatabaseClosedError("/srv/private.db is closed"), 503, None),
    (errors.DiskFullError("/srv/private.db has no room"), 503, None),
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

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.get("/")

    return anyio.run(ask)


@pytest.mark.parametrize(("error", "status", "retry_after"), ANSWERS, ids=NAMES)
def test_answers(error: errors.HomeAgentError, status: int, retry_after: str | None) -> None:
    """Each error gives its status and its name; the message describes the request or is replaced."""
    response = answer_to(error)
    assert response.status_code == status
    assert response.json()["error"] == type(error).__name__
    assert (response.json()["detail"] == str(error)) == (status != 503)
    assert "private" not in response.text
    assert response.headers.get("retry-after") == retry_after


def test_bad_argument() -> None:
    """A bad argument gives the form of FastAPI's own 422, without the input."""
    response = answer_to(errors.InvalidArgumentError("limit must be 1 or more"))
    assert response.status_code == 422
    assert response.json() == {"detail": [{"type": "value_error", "loc": [], "msg": "limit must be 1 or more"}]}


def test_server_errors_stay_500() -> None:
    """If an error concerns the server, the response is a 500 without details."""
    for error in (errors.CorruptDatabaseError("/srv/private.db"), errors.CommitUnknownError("private")):
        response = answer_to(error)
        assert response.status_code == 500
        assert "private" not in response.text
