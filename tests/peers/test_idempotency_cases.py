"""The cases of two other implementations of idempotency keys, on this store.

Neither `asgi-idempotency-header` 0.2.0 nor `aws-lambda-powertools` 3.37.0 ships its tests in its source distribution.
The cases here are written from their documentation. Each docstring names a difference, if there is one.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from itertools import count
from typing import Annotated, Any
from uuid import uuid4

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import JsonValue

from homeagent import Attempt, Database, DevicePair, IdempotencyScope, Role, errors
from homeagent.fastapi import Once, bearer_token, idempotent, install_error_handlers
from homeagent.testing import FakeClock

SCOPE = IdempotencyScope(device_id="lamp", method="pay", key="order-1")


class TestHeader:
    """Cases of asgi-idempotency-header: an HTTP service and the header Idempotency-Key."""

    @pytest.fixture
    def service(self, homeagent_database: Database) -> httpx.AsyncClient:
        """A client of a service whose answers differ, with the credentials of a device."""
        app = FastAPI()
        app.state.homeagent_database = homeagent_database
        install_error_handlers(app)
        numbers = count()

        @app.api_route("/json", methods=["POST", "PUT", "PATCH", "DELETE"])
        async def json(once: Annotated[Once, Depends(idempotent(required=False))]) -> Any:
            return await once(lambda attempt: {"number": next(numbers)})

        @app.post("/text")
        async def text(once: Annotated[Once, Depends(idempotent())]) -> Any:
            return await once(lambda attempt: PlainTextResponse(str(next(numbers)), 202))

        @app.post("/slow")
        async def slow(once: Annotated[Once, Depends(idempotent())]) -> Any:
            async def effect(attempt: Attempt) -> dict[str, int]:
                await asyncio.sleep(0.05)  # the other requests arrive in the meantime
                return {"number": next(numbers)}

            return await once(effect)

        secret = homeagent_database.pair(DevicePair(id="phone", role=Role.CLIENT)).shared_secret
        homeagent_database.devices.approve("phone")
        headers = {"Authorization": f"Bearer {bearer_token('phone', secret)}"}
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://peer", headers=headers)

    def test_without_the_header(self, service: httpx.AsyncClient) -> None:
        """Requests without a key are independent."""

        async def run() -> list[Any]:
            return [(await service.post("/json")).json() for _ in range(3)]

        assert asyncio.run(run()) == [{"number": number} for number in range(3)]

    @pytest.mark.parametrize(
        ("method", "path"), [(method, "/json") for method in ("POST", "PUT", "PATCH", "DELETE")] + [("POST", "/text")]
    )
    def test_a_repetition(self, service: httpx.AsyncClient, method: str, path: str) -> None:
        """A repetition gets the same status, body and type. The peer does not store an answer that is not JSON."""

        async def run() -> list[httpx.Response]:
            headers = {"Idempotency-Key": str(uuid4())}
            return [await service.request(method, path, headers=headers) for _ in range(3)]

        replies = asyncio.run(run())
        assert len({(reply.status_code, reply.content, reply.headers["content-type"]) for reply in replies}) == 1
        assert [reply.headers.get("idempotency-replayed") for reply in replies] == [None, "true", "true"]

    def test_concurrent_repetitions(self, service: httpx.AsyncClient) -> None:
        """Of several requests with one key at the same time, one is answered, and each other one gets status 409."""

        async def run() -> list[httpx.Response]:
            headers = {"Idempotency-Key": str(uuid4())}
            return await asyncio.gather(*(service.post("/slow", headers=headers) for _ in range(5)))

        assert sorted(reply.status_code for reply in asyncio.run(run())) == [200, 409, 409, 409, 409]


class TestFunction:
    """Cases of AWS Powertools: a decorated function and its payload."""

    def test_the_payload(self, homeagent_database: Database) -> None:
        """The order of the payload's keys has no effect, and another payload under the same key is refused."""
        answers: list[JsonValue] = [{"paid": 1}, {"paid": 2}]
        effect = iter(answers).__next__
        first = homeagent_database.run_once(SCOPE, lambda attempt: effect(), params={"a": 1, "b": [2]})
        again = homeagent_database.run_once(SCOPE, lambda attempt: effect(), params={"b": [2], "a": 1})
        assert (first.value, first.replayed) == ({"paid": 1}, False)
        assert (again.value, again.replayed) == ({"paid": 1}, True)
        with pytest.raises(errors.FingerprintMismatchError):
            homeagent_database.run_once(SCOPE, lambda attempt: effect(), params={"a": 2, "b": [2]})

    def test_no_result(self, homeagent_database: Database) -> None:
        """A function that returns None runs once as well."""
        calls: list[Attempt] = []
        outcomes = [homeagent_database.run_once(SCOPE, calls.append) for _ in range(2)]
        assert [outcome.value for outcome in outcomes] == [None, None]
        assert len(calls) == 1

    def test_expiry(self, homeagent_database: Database, homeagent_clock: FakeClock) -> None:
        """After the time to live the function runs again."""
        numbers = count()

        def pay() -> Any:
            return homeagent_database.run_once(SCOPE, lambda attempt: next(numbers), ttl=timedelta(hours=1)).value

        assert [pay(), pay()] == [0, 0]
        homeagent_clock.advance(timedelta(hours=1))
        assert pay() == 1

    def test_in_progress(self, homeagent_database: Database) -> None:
        """A call during the first call is refused."""

        def pay(attempt: Attempt) -> None:
            with pytest.raises(errors.IdempotencyInProgressError):
                homeagent_database.run_once(SCOPE, lambda inner: None)

        homeagent_database.run_once(SCOPE, pay)

    def test_an_exception(self, homeagent_database: Database, homeagent_clock: FakeClock) -> None:
        """The peer runs the function again after any exception, and after a timeout.

        Here the exception must say that nothing took effect. After another exception the outcome is unknown, unless the
        caller allows a second run with `on_abandoned="rerun"`.
        """

        def fail(error: Exception) -> Any:
            raise error

        with pytest.raises(errors.EffectNotStartedError):
            homeagent_database.run_once(SCOPE, lambda attempt: fail(errors.EffectNotStartedError()))
        with pytest.raises(ZeroDivisionError):
            homeagent_database.run_once(SCOPE, lambda attempt: fail(ZeroDivisionError()))
        homeagent_clock.advance(timedelta(minutes=2))
        with pytest.raises(errors.OutcomeUnknownError):
            homeagent_database.run_once(SCOPE, lambda attempt: "again")
        assert homeagent_database.run_once(SCOPE, lambda attempt: "again", on_abandoned="rerun").value == "again"
