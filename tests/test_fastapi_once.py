"""The header Idempotency-Key, and signed webhooks: an effect happens once, and a retry gets the first answer."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Body, Depends, FastAPI, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr, computed_field

from homeagent import Attempt, Database, DevicePair, DevicePublic, IdempotencyScope, Limits, Role, errors
from homeagent.fastapi import (
    CurrentDevice,
    Once,
    Webhook,
    bearer_token,
    idempotent,
    install_error_handlers,
    signed_webhook,
)
from homeagent.testing import DatabaseFactory, FakeClock
from tests.asgi import Client
from tests.conftest import ROOT, pair
from tests.credentials.conftest import cheap_hashes as cheap_hashes

pytestmark = pytest.mark.usefixtures("cheap_hashes")

Key = Annotated[Once, Depends(idempotent())]


class Door(BaseModel):
    name: str
    count: int


class House:
    """The effects of the application, with a count of their runs."""

    def __init__(self) -> None:
        self.count = 0
        self.keys: list[str] = []

    async def open(self, name: str, key: str) -> Door:
        self.count += 1
        self.keys.append(key)
        return Door(name=name, count=self.count)

    def close(self, attempt: Attempt) -> dict[str, Any]:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()  # a plain function does not block the event loop
        self.count += 1
        return {"count": self.count}

    def fail(self, error: Exception) -> None:
        self.count += 1
        raise error


def make_app(house: House) -> FastAPI:
    """Return an application whose effects are counted."""
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/doors/{door}/open")
    async def open_door(door: str, device: CurrentDevice, once: Key) -> Any:
        return await once(lambda attempt: house.open(door, attempt.downstream_key))

    @app.post("/doors/{door}/close", status_code=202)
    async def close_door(door: str, once: Annotated[Once, Depends(idempotent(required=False))]) -> dict[str, Any]:
        answer: dict[str, Any] = await once(house.close)
        return answer

    @app.post("/created")
    async def created(once: Key) -> Any:
        return await once(lambda attempt: JSONResponse(house.close(attempt), 201))

    @app.post("/twice")
    async def twice(once: Key) -> Any:
        await once(house.close)
        return await once(house.close)

    @app.post("/text")
    async def text(once: Key) -> Any:
        return await once(lambda attempt: PlainTextResponse(f"n° {house.close(attempt)['count']}", 203))

    @app.post("/redirected")
    async def redirected(once: Key) -> Any:
        cookie = {"Set-Cookie": "private"}
        return await once(lambda attempt: RedirectResponse(f"/doors/{house.close(attempt)['count']}", 303, cookie))

    @app.post("/stream")
    async def stream(once: Key) -> Any:
        return await once(lambda attempt: StreamingResponse(iter([str(house.close(attempt))])))

    @app.post("/bytes")
    async def not_json(once: Key) -> Any:
        return await once(lambda attempt: house.close(attempt) and b"\xff")

    @app.post("/large")
    async def large(once: Key) -> Any:
        return await once(lambda attempt: {"text": "x" * 1024 * 1024, **house.close(attempt)})

    @app.post("/fail/{kind}")
    async def fail(kind: str, once: Key) -> Any:
        details: dict[str, Any] = {"number": {1: object()}, "numbers": {1: (2,)}}
        failures: dict[str, Exception] = {
            "http": HTTPException(404, "no such door"),
            **{str(status): HTTPException(status, headers={"Location": "/"}) for status in (204, 205, 304)},
            "absent": errors.AgentNotFoundError("private"),
            "full": errors.PendingLimitError(10),
            "failed": errors.EffectFailedError({"jammed": True}),
            "pair": HTTPException(400, (1, 2)),
            **{name: errors.EffectFailedError(detail) for name, detail in details.items()},
            "later": errors.EffectNotStartedError("private"),
            "crash": RuntimeError("private"),
        }
        return await once(lambda attempt: house.fail(failures[kind]))

    return app


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
def client(homeagent_database: Database, house: House) -> Client:
    """A client of the application with the credentials of an approved device."""
    client = Client(make_app(house), homeagent_database, raises=False)
    for name, header in (("phone", "Authorization"), ("tablet", "X-Tablet")):
        client.headers[header] = "Bearer " + bearer_token(name, pair(homeagent_database, name))
    return client


def post(client: Client, path: str, key: str | None = "k-1", **request: Any) -> httpx.Response:
    headers = {**request.pop("headers", {}), **({} if key is None else {"Idempotency-Key": key})}
    return client.post(path, headers=headers, **request)


def test_a_retry_gets_the_first_answer(client: Client, house: House) -> None:
    """The effect runs once for a key; a retry gets the same status and body, and the header says that it is one."""
    first, retry = post(client, "/doors/front/open"), post(client, "/doors/front/open", '"k-1"')
    assert first.json() == retry.json() == {"name": "front", "count": 1}
    assert "idempotency-replayed" not in first.headers
    assert retry.headers["idempotency-replayed"] == "true"
    assert post(client, "/doors/front/open", "k-2").json()["count"] == 2
    assert len(set(house.keys)) == 2
    for path, status in (("/doors/front/close", 202), ("/created", 201), ("/text", 203), ("/redirected", 303)):
        first, retry = post(client, path), post(client, path)
        assert (first.status_code, first.content) == (retry.status_code, retry.content)
        for name in ("content-type", "location"):
            assert first.headers.get(name) == retry.headers.get(name)
        assert "set-cookie" not in retry.headers
        assert (first.status_code, retry.headers["idempotency-replayed"]) == (status, "true")


class Lock(BaseModel):
    """A model whose output is not a valid input."""

    model_config = ConfigDict(extra="forbid")
    is_open: bool = Field(serialization_alias="isOpen")
    pin: str = Field(exclude=True)

    @computed_field
    def closed(self) -> bool:
        return not self.is_open


def test_the_model_of_a_reply(client: Client, house: House) -> None:
    """An effect can return each value that the route can return. A retry gets the body that the model gave."""

    @client.app.post("/me", status_code=201)
    async def me(device: CurrentDevice, once: Key) -> DevicePublic:
        answer: DevicePublic = await once(lambda attempt: house.close(attempt) and device)
        return answer

    @client.app.post("/locks", response_model_exclude={"__all__": {"closed"}})
    async def locks(once: Key, response: Response) -> list[Lock]:
        response.headers["X-Locks"] = "1"
        answer: list[Lock] = await once(lambda attempt: iter([Lock(is_open=bool(house.close(attempt)), pin="1")]))
        return answer

    @client.app.post("/page", response_class=HTMLResponse)
    async def page(once: Key) -> str:
        answer: str = await once(lambda attempt: f"<p>{house.close(attempt)['count']}</p>")
        return answer

    @client.app.post("/empty")
    async def empty(once: Key, response: Response) -> Lock | None:
        response.status_code = 204
        answer: Lock | None = await once(lambda attempt: house.close(attempt) and None)
        return answer

    @client.app.post("/wrong")
    async def wrong(once: Key) -> Lock:
        answer: Lock = await once(house.close)
        return answer

    for path, status in {"/me": 201, "/locks": 200, "/page": 200, "/empty": 204}.items():
        first, retry = post(client, path), post(client, path)
        assert (first.status_code, first.content) == (status, retry.content) == (retry.status_code, first.content)
        assert retry.headers.pop("idempotency-replayed") == "true"
        assert first.headers == retry.headers
    assert "shared_secret_hash" not in post(client, "/me").json()
    assert post(client, "/locks").json() == [{"isOpen": True}]
    assert [post(client, "/wrong").status_code for _ in range(2)] == [500, 409]
    assert house.count == 5


def test_keys_belong_to_a_device_and_a_route(client: Client, house: House) -> None:
    """Another device, and another route, can use the same key for their own effects."""
    tablet = client.headers["X-Tablet"]
    assert post(client, "/doors/front/open").json()["count"] == 1
    assert post(client, "/doors/front/open", headers={"Authorization": tablet}).json()["count"] == 2
    assert post(client, "/created").json()["count"] == 3


def test_keys_under_the_prefixes_of_a_router(client: Client, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that is included under several prefixes has several routes, each with answers of its own."""
    router, outer = APIRouter(), APIRouter(prefix="/deep")

    @router.post("/{door:path}")
    async def open_door(door: str, once: Key) -> Any:
        return await once(house.close)

    outer.include_router(router, prefix="/er")
    for prefix in ("/a", "/b"):
        client.app.include_router(router, prefix=prefix)
    client.app.include_router(outer)
    paths = ["/a/front", "/b/front", "/deep/er/front"]
    assert [post(client, path).json() for path in paths + paths] == [{"count": 1}, {"count": 2}, {"count": 3}] * 2
    # If FastAPI no longer tells the whole path, the key is refused.
    monkeypatch.setattr("homeagent.fastapi.once.route_of", lambda request: "POST /{door:path}")
    assert [post(client, path, "k-2").status_code for path in paths] == [200, 422, 422]


@pytest.mark.parametrize("key", [None, "", "a\x7fb", "k" * 2000])
def test_an_absent_or_invalid_key(client: Client, house: House, key: str | None) -> None:
    """Without a valid key the request is refused, if the route requires a key."""
    response = post(client, "/created", key)
    assert (response.status_code, response.json()["error"]) == (400, "InvalidArgumentError")
    assert house.count == 0
    twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert client.post("/created", headers=twice).status_code == 400
    if key is None:
        assert [post(client, "/doors/front/close", key).json()["count"] for _ in range(2)] == [1, 2]
        paths = client.get("/openapi.json").json()["paths"]
        described = [paths[path]["post"]["parameters"][-1] for path in ("/created", "/doors/{door}/close")]
        assert [("Required key" in str(each), each["required"]) for each in described] == [(True, True), (False, False)]


def test_another_request_under_the_same_key(client: Client, house: House) -> None:
    """If the body, the query or the path differs, the key is refused."""
    assert post(client, "/doors/front/open", json={"a": 1}).status_code == 200
    for path, value in (("/doors/front/open", 2), ("/doors/back/open", 1), ("/doors/front/open?x=1", 1)):
        response = post(client, path, json={"a": value})
        assert (response.status_code, response.json()["error"]) == (422, "FingerprintMismatchError")
    assert house.count == 1


def test_the_size_of_a_body(client: Client, hooks: Client, house: House) -> None:
    """A body over the maximum is refused before the whole body was read, and the route can read a smaller body."""

    @client.app.post("/size")
    async def size(request: Request, once: Annotated[Once, Depends(idempotent(max_body=100))]) -> Any:
        read = len(await request.body())
        return await once(lambda attempt: {"size": read})

    @client.app.post("/declared")
    async def declared(body: Annotated[str, Body()], once: Annotated[Once, Depends(idempotent(max_body=100))]) -> Any:
        return await once(house.close)

    sent: list[int] = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            sent.append(64)
            yield b"x" * 64

    assert post(client, "/size", content=b"x" * 100).json() == {"size": 100}
    refusals = [
        post(client, "/size", content=endless()),
        post(client, "/declared", json="x" * 100),
        hooks.post("/hook", content=b"x" * (1024 * 1024 + 1), headers={"webhook-id": "m"}),
    ]
    assert [(each.status_code, each.json()["error"]) for each in refusals] == [(413, "InvalidArgumentError")] * 3
    assert refusals[0].json()["detail"] == "The body has more than 100 bytes."
    assert (len(sent), house.count) == (2, 0)


def test_forms(client: Client, house: House) -> None:
    """The fields and the files of a form count as its body, and the route can still read them."""
    pytest.importorskip("python_multipart")

    @client.app.post("/form")
    async def form(once: Key, name: Annotated[str, Form()], photo: Annotated[UploadFile, File()]) -> Any:
        content = await photo.read()
        return await once(lambda attempt: {"size": len(content), **house.close(attempt)})

    photos = [{"photo": ("p.png", content)} for content in (b"abc", b"abc", b"d")]
    answers = [post(client, "/form", data={"name": "x"}, files=photo) for photo in photos]
    assert [answer.status_code for answer in answers] == [200, 200, 422]
    assert answers[1].json() == {"size": 3, "count": 1}

    @client.app.post("/small")
    async def small(
        name: Annotated[str, Form()], photo: UploadFile, once: Annotated[Once, Depends(idempotent(max_body=300))]
    ) -> Any:
        return await once(house.close)

    async def chunked(body: bytes) -> AsyncIterator[bytes]:
        yield body

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    statuses = []
    for size in (50, 290, 301):
        file = {"photo": ("p.png", b"x" * size)}
        request = httpx.Request("POST", "http://gateway", headers=headers, data={"name": "n"}, files=file)
        for content in (request.read(), chunked(request.read())):
            reply = post(client, "/small", f"{size}", content=content, headers=headers)
            statuses.append(reply.status_code)
    # The body of the second form is larger than the sum of its fields.
    assert statuses == [200, 200, 413, 200, 413, 413]


def test_an_omitted_form(client: Client, house: House) -> None:
    """If a route has an optional form and the request has another body, the body's bytes count."""
    pytest.importorskip("python_multipart")

    @client.app.post("/optional")
    async def optional(
        request: Request, once: Annotated[Once, Depends(idempotent(max_body=100))], name: Annotated[str, Form()] = ""
    ) -> Any:
        text = name or (await request.body()).decode()
        return await once(lambda attempt: {"text": text, **house.close(attempt)})

    async def chunked() -> AsyncIterator[bytes]:
        yield b"x" * 60
        yield b"x" * 60

    assert [post(client, "/optional", json=value).status_code for value in (1, 2, 1)] == [200, 422, 200]
    assert post(client, "/optional", json=1).json() == {"text": "1", "count": 1}
    assert post(client, "/optional", "k-2", content=chunked()).status_code == 413
    assert [post(client, "/optional", "k-3", data={"name": name}).status_code for name in "ab"] == [200, 422]


def test_failures(client: Client, house: House) -> None:
    """A known failure is an answer that retries get again. `EffectNotStartedError` frees the key."""
    kinds = {"http": 404, "absent": 404, "full": 409, "pair": 400, "number": 422, "numbers": 422, "failed": 422}
    for number, (kind, status) in enumerate(kinds.items(), 1):
        first, retry = (post(client, f"/fail/{kind}", kind) for _ in range(2))
        assert (first.status_code, first.content) == (status, retry.content) == (retry.status_code, first.content)
        assert first.headers["content-type"] == retry.headers["content-type"] == "application/problem+json"
        assert retry.headers["idempotency-replayed"] == "true"
        # A stored answer does not change, so the answer must not ask for the same request.
        assert "again later" not in first.json()["detail"]
        assert house.count == number
    assert first.json()["data"] == {"jammed": True}
    for status in (204, 205, 304):
        for reply in (post(client, f"/fail/{status}", f"{status}") for _ in range(2)):
            assert (reply.status_code, reply.headers["location"], reply.content) == (status, "/", b"")
    later = [post(client, "/fail/later", "later") for _ in range(2)]
    assert [(each.status_code, each.headers["retry-after"]) for each in later] == [(503, "1")] * 2
    assert house.count == 12


def test_an_unknown_outcome(client: Client, house: House, homeagent_clock: FakeClock) -> None:
    """After a crash of the effect, a retry is told to wait, and later that the outcome is unknown."""
    assert post(client, "/fail/crash").status_code == 500
    waiting = post(client, "/fail/crash")
    assert (waiting.status_code, waiting.headers["retry-after"]) == (409, "60")
    homeagent_clock.advance(timedelta(minutes=2))
    unknown = post(client, "/fail/crash")
    assert (unknown.status_code, unknown.json()["error"]) == (409, "OutcomeUnknownError")
    assert house.count == 1


@pytest.mark.parametrize("result", [{"order": 7}, 7, "text", None, {"status": 201, "value": 1}, {"body": "x"}])
def test_a_resolved_key(
    client: Client, hooks: Client, homeagent_database: Database, homeagent_clock: FakeClock, result: JsonValue
) -> None:
    """After an administrator recorded a result, a retry gets the result with the status of the route."""

    @client.app.post("/model", status_code=201)
    async def model(once: Key) -> Door:
        answer: Door = await once(lambda attempt: House().fail(RuntimeError()))
        return answer

    headers = sign(SECRET, "k-1", int(homeagent_clock().timestamp()), b"{}")
    with pytest.raises(KeyError):  # the message has no field that the effect needs
        hooks.post("/hook", content=b"{}", headers=headers)
    for path in ("/fail/crash", "/model"):
        assert post(client, path).status_code == 500
    homeagent_clock.advance(timedelta(minutes=2))
    for record in homeagent_database.idempotency_keys.list_abandoned():
        scope = IdempotencyScope(record.device_id, record.method, record.key)
        assert homeagent_database.idempotency_keys.resolve(scope, result)
    retries = [post(client, "/fail/crash"), post(client, "/model"), hooks.post("/hook", content=b"{}", headers=headers)]
    assert [(retry.status_code, retry.json()) for retry in retries] == [(200, result), (201, result), (200, result)]
    assert {retry.headers["idempotency-replayed"] for retry in retries} == {"true"}


def test_a_device_at_its_limit_of_keys(
    homeagent_factory: DatabaseFactory, house: House, homeagent_clock: FakeClock
) -> None:
    """The refusal of a new key is not stored: the same request succeeds when an earlier key has expired."""
    database = homeagent_factory(limits=Limits(keys_per_device=1))
    client = Client(make_app(house), database)
    client.headers["Authorization"] = "Bearer " + bearer_token("phone", pair(database))
    statuses = [post(client, "/doors/front/open", key).status_code for key in ("k-1", "k-2", "k-1", "k-2")]
    assert (statuses, house.count) == ([200, 409, 200, 409], 1)
    homeagent_clock.advance(timedelta(hours=24))
    assert (post(client, "/doors/front/open", "k-2").status_code, house.count) == (200, 2)


def test_two_effects_of_a_request(client: Client, house: House) -> None:
    """A second call for the same request is refused, because it would get the outcome of the first effect."""
    assert post(client, "/twice").status_code == 500
    assert house.count == 1


def test_two_dependencies_of_a_route(client: Client, house: House) -> None:
    """If a route has two dependencies, only one of them can run an effect, because both have the key of the request."""

    @client.app.post("/two")
    async def two(once: Key, again: Annotated[Once, Depends(idempotent())], both: bool = False) -> Any:
        answer = await once(house.close)
        return await again(house.close) if both else answer

    assert post(client, "/two").json() == {"count": 1}
    assert post(client, "/two?both=true", "k-2").status_code == 500
    assert house.count == 2


def test_an_effect_whose_body_does_not_run(client: Client, house: House) -> None:
    """If an effect returns an async generator, no success is recorded, because the generator's body did not run."""

    async def later(attempt: Attempt) -> AsyncIterator[Any]:
        yield house.close(attempt)

    @client.app.post("/later")
    async def answer(once: Key) -> Any:
        return await once(lambda attempt: later(attempt))

    statuses = [
        (reply.status_code, reply.json()["error"]) for reply in (post(client, "/later"), post(client, "/later"))
    ]
    assert statuses == [(422, "InvalidArgumentError"), (409, "IdempotencyInProgressError")]
    assert house.count == 0


def test_keys_of_an_object_without_texts(client: Client, house: House) -> None:
    """If a dict has numbers as keys, a retry gets the same JSON as the first request."""

    @client.app.post("/numbers", response_model=None)
    async def numbers(once: Key) -> Any:
        return await once(lambda attempt: {1: house.close(attempt), None: [{0.5: False}], False: 2})

    @client.app.post("/model")
    async def model(once: Key) -> dict[Any, Any]:
        answer: dict[Any, Any] = await once(lambda attempt: {1: house.close(attempt), None: [{0.5: (False,)}]})
        return answer

    first, retry = post(client, "/numbers"), post(client, "/numbers")
    assert (first.status_code, first.json()) == (200, {"1": {"count": 1}, "null": [{"0.5": False}], "false": 2})
    assert (retry.status_code, retry.content) == (200, first.content)
    first, retry = post(client, "/model"), post(client, "/model")
    assert (first.status_code, first.json()) == (200, {"1": {"count": 2}, "None": [{"0.5": [False]}]})
    assert (retry.status_code, retry.content) == (200, first.content)


def test_an_answer_that_cannot_be_stored(client: Client, house: House) -> None:
    """After a streamed or large answer, or an answer that has no JSON, a retry learns that the effect took place."""
    assert post(client, "/stream").text == "{'count': 1}"
    assert post(client, "/bytes").status_code == 500
    assert len(post(client, "/large").content) > 1024 * 1024
    for path in ("/stream", "/bytes", "/large"):
        retry = post(client, path)
        assert (retry.status_code, retry.json()["error"]) == (409, "IdempotencyError")
        assert retry.json()["detail"] == "The request took effect. Its answer could not be stored."
    assert house.count == 3


# Webhooks

SECRET = "whsec_" + base64.b64encode(bytes(range(24))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(24)).decode()


def sign(secret: str, message_id: str, at: int, body: bytes) -> dict[str, str]:
    """Return the headers of a message, as the specification of Standard Webhooks says."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.digest(key, f"{message_id}.{at}.".encode() + body, "sha256")
    signature = "v1," + base64.b64encode(digest).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(at), "webhook-signature": signature}


@pytest.fixture
def hooks(homeagent_database: Database, house: House) -> Client:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/hook")
    @app.post("/hook/{room}")
    async def hook(webhook: Annotated[Webhook, Depends(signed_webhook([OTHER, SECRET], sender="bell"))]) -> Any:
        return await webhook(lambda attempt: {"rung": webhook.json()["rung"], **house.close(attempt)})

    return Client(app, homeagent_database)


def test_a_webhook_is_handled_once(
    hooks: Client, house: House, homeagent_clock: FakeClock, homeagent_database: Database
) -> None:
    """A signed message is handled once: a replay, and a later repetition by the sender, get the first answer. The
    doctor accepts the keys of the messages.
    """
    body, now = b'{"rung": 1}', int(homeagent_clock().timestamp())
    headers = sign(SECRET, "m-1", now, body)
    first = hooks.post("/hook", content=body, headers=headers)
    assert (first.status_code, first.json()) == (200, {"rung": 1, "count": 1})
    replay = hooks.post("/hook", content=body, headers=headers)
    assert (replay.content, replay.headers["idempotency-replayed"]) == (first.content, "true")
    homeagent_clock.advance(timedelta(hours=1))
    assert hooks.post("/hook", content=body, headers=headers).status_code == 401
    repeated = hooks.post("/hook", content=body, headers=sign(SECRET, "m-1", now + 3600, body))
    assert (repeated.content, house.count) == (first.content, 1)
    # Let the difference of the times be exactly the tolerance.
    homeagent_clock.advance(timedelta(microseconds=-homeagent_clock().microsecond % 1_000_000))
    rotated = sign(OTHER, "m-2", int(homeagent_clock().timestamp()) - 300, body)
    rotated["webhook-signature"] = f"v1a,xyz {rotated['webhook-signature']}"
    assert hooks.post("/hook", content=body, headers=rotated).json()["count"] == 2
    references = homeagent_database.doctor().finding("references")
    assert references is not None
    assert (references.severity, references.facts["keys"]) == ("ok", 0)


def test_a_webhook_with_a_form(hooks: Client, homeagent_clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """If the route of a webhook declares a form, the log names the remedy, because the signed bytes are gone."""
    pytest.importorskip("python_multipart")

    @hooks.app.post("/form")
    async def form(
        x: Annotated[str, Form()], webhook: Annotated[Webhook, Depends(signed_webhook(SECRET, sender="bell"))]
    ) -> Any:
        return await webhook(lambda attempt: x)

    headers = sign(SECRET, "m-1", int(homeagent_clock().timestamp()), b"x=1")
    headers["content-type"] = "application/x-www-form-urlencoded"
    assert hooks.post("/form", content=b"x=1", headers=headers).status_code == 500
    assert "read the fields from webhook.body" in caplog.text
    headers["content-type"] = "application/json"  # FastAPI reads no form
    del hooks.app.router.routes[-1]

    @hooks.app.post("/form")
    async def optional(
        webhook: Annotated[Webhook, Depends(signed_webhook(SECRET, sender="bell"))], x: Annotated[str, Form()] = "none"
    ) -> Any:
        return await webhook(lambda attempt: x)

    assert hooks.post("/form", content=b"x=1", headers=headers).json() == "none"
    headers = {**headers, **sign(SECRET, "m-1", int(homeagent_clock().timestamp()), b"x=2")}
    assert hooks.post("/form", content=b"x=2", headers=headers).status_code == 422


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000])
def test_a_webhook_without_json(hooks: Client, homeagent_clock: FakeClock, body: bytes) -> None:
    """A body that is not JSON, or is nested too deeply, gets status 422, also when the sender repeats the message."""
    headers = sign(SECRET, "m-1", int(homeagent_clock().timestamp()), body)
    replies = [hooks.post("/hook", content=body, headers=headers) for _ in range(2)]
    assert [(each.status_code, each.json()["detail"]) for each in replies] == [(422, "The body is not JSON.")] * 2


def test_a_webhook_for_another_path(hooks: Client, house: House, homeagent_clock: FakeClock) -> None:
    """A message that is sent again to another path of the route gets an error, and not the first path's answer."""
    body = b'{"rung": 1}'
    headers = sign(SECRET, "m-1", int(homeagent_clock().timestamp()), body)
    paths = ("/hook/hall", "/hook/attic", "/hook/hall?bell=2", "/hook/hall")
    replies = [hooks.post(path, content=body, headers=headers) for path in paths]
    assert [reply.status_code for reply in replies] == [200, 422, 422, 200]
    assert (replies[1].json()["error"], house.count) == ("FingerprintMismatchError", 1)


def test_a_stranger_cannot_erase_a_webhook(
    hooks: Client, house: House, homeagent_clock: FakeClock, homeagent_database: Database
) -> None:
    """A replay gets the first answer, also after a device was paired under the name of the sender and deleted."""
    body = b'{"rung": 1}'
    headers = sign(SECRET, "m-1", int(homeagent_clock().timestamp()), body)
    first = hooks.post("/hook", content=body, headers=headers)
    pair(homeagent_database, "bell")
    homeagent_database.devices.delete("bell")
    assert hooks.post("/hook", content=body, headers=headers).content == first.content
    assert house.count == 1


def test_a_webhook_from_before_a_restore(
    hooks: Client, house: House, homeagent_clock: FakeClock, sqlite_path: Path
) -> None:
    """A message that was signed at most the tolerance after a restore is refused: its key can be lost."""
    Database.open(sqlite_path, clock=homeagent_clock).close()
    Database.begin_epoch(sqlite_path, clock=homeagent_clock)
    with Database.open(sqlite_path, clock=homeagent_clock) as database:
        hooks.app.state.homeagent_database = database
        for seconds, status in ((0, 401), (300, 401), (1, 200)):
            now = homeagent_clock.advance(seconds=seconds)
            headers = sign(SECRET, "m-1", int(now.timestamp()), b'{"rung": 1}')
            assert hooks.post("/hook", content=b'{"rung": 1}', headers=headers).status_code == status
    assert house.count == 1


def test_forged_webhooks(hooks: Client, house: House, homeagent_clock: FakeClock) -> None:
    """A changed body, id, time or signature, an old or a future time, and absent headers get the same refusal."""
    body, now = b'{"rung": 1}', int(homeagent_clock().timestamp())
    right = sign(SECRET, "m-1", now, body)
    attempts = [
        (b'{"rung": 2}', right),
        (body, {**right, "webhook-id": "m-2"}),
        (body, {**right, "webhook-timestamp": str(now + 1)}),
        (body, {**right, "webhook-signature": "v1," + "A" * 43 + "="}),
        (body, {**right, "webhook-signature": right["webhook-signature"].replace("v1,", "v1a,")}),
        (body, sign("whsec_" + "A" * 32 + "AAAA", "m-1", now, b"x")),
        (body, sign(SECRET, "m-1", now - 301, body)),
        (body, sign(SECRET, "m-1", now + 301, body)),
        (body, sign(SECRET, "", now, body)),
        (b"1}", sign(SECRET, f"m-1.{now}", now, b"1}")),
        (body, {**right, "webhook-timestamp": "٣"}),
        (body, {}),
    ]
    replies = [
        hooks.post("/hook", content=content, headers={name: value.encode() for name, value in headers.items()})
        for content, headers in attempts
    ]
    assert {reply.status_code for reply in replies} == {401}
    assert len({reply.text for reply in replies}) == 1
    assert house.count == 0
    assert json.loads(replies[0].text)["error"] == "AuthenticationError"


def test_many_signatures_of_a_webhook(hooks: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway computes one signature for each secret, however many signatures a stranger sends."""
    computed: list[int] = []
    digest = hmac.digest

    def count(key: bytes, message: bytes, name: str) -> bytes:
        computed.append(len(message))
        return digest(key, message, name)

    headers = {**sign(SECRET, "m-1", 1, b"{}"), "webhook-signature": "v1,x " * 1000}
    monkeypatch.setattr("homeagent.fastapi.webhooks.hmac.digest", count)
    assert hooks.post("/hook", content=b"{}", headers=headers).status_code == 401
    assert len(computed) == 2


@pytest.mark.parametrize(
    "option",
    [{"ttl": timedelta(0)}, {"ttl": 5}, {"lease": None}, {"on_abandoned": "x"}, {"max_body": -1}, {"max_body": "x"}],
)
def test_invalid_options(option: dict[str, Any]) -> None:
    """An invalid option is refused when the route is defined, and not in each request."""
    with pytest.raises(errors.InvalidArgumentError, match=next(iter(option))):
        idempotent(**option)
    with pytest.raises(errors.InvalidArgumentError, match=next(iter(option))):
        signed_webhook(SECRET, sender="bell", **option)


def test_invalid_webhook_settings() -> None:
    """A secret that is short or malformed, no secret, no sender, and a short `ttl` are refused at once."""
    wrong: Any = 5
    secrets: list[Any] = [
        "whsec_",
        "whsec_%%%",
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        [],
        b"x",
        [5],
        5,
        None,
    ]
    for secret in secrets:
        with pytest.raises(errors.InvalidArgumentError):
            signed_webhook(secret, sender="bell")
    with pytest.raises(errors.InvalidArgumentError, match="ttl must be more than twice"):
        signed_webhook(SECRET, sender="bell", ttl=timedelta(minutes=10))
    with pytest.raises(errors.InvalidArgumentError, match="sender must have 1"):
        signed_webhook(SECRET, sender="")
    with pytest.raises(errors.InvalidArgumentError, match="sender must be text"):
        signed_webhook(SECRET, sender=wrong)
    with pytest.raises(errors.InvalidArgumentError, match="required must be True or False"):
        idempotent("no")  # type: ignore[arg-type]  # the wrong value is the subject


def test_the_page(homeagent_database: Database, homeagent_clock: FakeClock) -> None:
    """The application of docs/fastapi.md answers as the page says."""
    page = (ROOT / "docs" / "fastapi.md").read_text(encoding="utf-8").partition("## Accept WebSockets")[0]
    names: dict[str, Any] = {"secret": SECRET}
    for block in re.findall("^```py\n(.*?)^```$", page, re.M | re.S):
        exec(block, names)  # noqa: S102  the page's own code
    client = Client(names["app"], homeagent_database)
    token = bearer_token("anna", pair(homeagent_database, "anna", SecretStr("a secret of anna"), role=Role.ADMIN))
    lamp = homeagent_database.pair(DevicePair(id="lamp", role=Role.NODE)).device
    token = client.post("/sign-in/browser", headers={"Authorization": f"Bearer {token}"}).json()["token"]
    client.headers["Authorization"] = f"Bearer {token}"
    assert post(client, "/doors/front/open").json() == {"opened": "front"}
    seen = {"role": "admin", "paired_at": lamp.paired_at.isoformat()}
    assert client.post("/devices/approve/lamp", params=seen).status_code == 409
    assert client.post("/devices/approve/lamp", params={**seen, "role": "node"}).json() == {"changed": True}
    headers = sign(SECRET, "m-1", int(homeagent_clock().timestamp()), b'{"door": "front"}')
    assert client.post("/bell", content=b'{"door": "front"}', headers=headers).json() == {"rung": "front"}
    assert client.get("/health").status_code == 200
