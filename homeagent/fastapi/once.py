"""Run an effect once for each Idempotency-Key of a device (draft-ietf-httpapi-idempotency-key-header)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from datetime import timedelta
from inspect import isawaitable, iscoroutinefunction
from secrets import token_urlsafe
from typing import Any

from anyio.to_thread import run_sync
from fastapi import Depends, Header, HTTPException, Request, Response
from fastapi.datastructures import DefaultPlaceholder
from fastapi.routing import serialize_response
from fastapi.utils import is_body_allowed_for_status_code
from pydantic import JsonValue
from starlette.datastructures import UploadFile

from homeagent.callables import check_function, refuse_deferred
from homeagent.database import Database
from homeagent.errors import (
    AlreadyExistsError,
    ConflictError,
    EffectFailedError,
    HomeAgentError,
    IdempotencyError,
    InvalidArgumentError,
    NotFoundError,
    UnitStateError,
)
from homeagent.fastapi.authentication import current_device
from homeagent.fastapi.lifespan import DatabaseDep
from homeagent.fastapi.problems import REQUIRED_KEY, HTTPProblem, as_http, json_of, problem_response
from homeagent.idempotency import OnAbandoned, check_on_abandoned
from homeagent.models.device import Device
from homeagent.models.idempotency_key import Attempt, IdempotencyScope, Outcome
from homeagent.models.types import check_duration

MAX_BODY = 1024 * 1024
"""Largest body in bytes by default, as in nginx."""

_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')  # a String of RFC 8941, section 3.3.3

# Errors after which the outcome of an effect is known.
_KNOWN = (AlreadyExistsError, ConflictError, InvalidArgumentError, NotFoundError)

# Do not store headers such as Set-Cookie, which can hold a secret.
_KEPT_HEADERS = ("content-type", "content-encoding", "location")

# Key in each stored reply. A result of `IdempotencyKeyStore.resolve()` or `insert()` lacks the key.
_REPLY = "homeagent.fastapi"

# Do not declare the header as required. FastAPI would answer a request without the header with status 422. The function
# `install_error_handlers()` marks the header as required in the OpenAPI document.
_KEY_DESCRIPTIONS = {
    True: REQUIRED_KEY,
    False: "Key of the call, the same in each retry.",
}

# Options of a route's response model
_MODEL_OPTIONS = ("include", "exclude", "by_alias", "exclude_unset", "exclude_defaults", "exclude_none")

Effect = Callable[[Attempt], Any]


class Once:
    """Run the effect of a request once. A retry gets the status and the body of the first answer. The dependency from
    `idempotent()` creates the `Once` object.
    """

    def __init__(
        self,
        database: Database,
        request: Request,
        response: Response,
        scope: IdempotencyScope,
        *,
        stored: bool,
        params: JsonValue,
        lease: timedelta,
        ttl: timedelta,
        on_abandoned: OnAbandoned,
    ) -> None:
        self._database = database
        self._response = response
        self._scope = scope
        self._called = called_in(request)
        self._route = matched_route(request)
        self._stored = stored
        self._params = params
        self._lease = lease
        self._ttl = ttl
        self._on_abandoned = on_abandoned
        self._first: Any = None

    async def __call__(self, effect: Effect) -> Any:
        """Run the effect, or return the first answer for the key. The HTTP endpoint must return the answer unchanged,
        because the answer of a retry can be a `Response`.

        Args:
            effect: function that gets the attempt, and returns JSON, a model, or a Response. A coroutine function runs
                in the event loop. Any other function runs in a worker thread.

        Raises:
            HTTPProblem: if the effect has no result. The status is 409, 422 or 503.
            UnitStateError: if the `Once` object, or another `Once` object with the same key, was already called.
        """
        check_function(effect, "effect")
        if self._scope in self._called:
            # A second call with the same key would return the first outcome.
            raise UnitStateError(
                "a request has one effect: call only one object, call it once, and do all work in one function"
            )
        self._called.add(self._scope)
        try:
            if not self._stored:
                await self._run(effect, self._unstored_attempt())
                return self._first
            again = self._on_abandoned
            outcome = await self._database.arun_once(
                self._scope,
                lambda attempt: self._run(effect, attempt),
                params=self._params,
                lease=self._lease,
                ttl=self._ttl,
                on_abandoned=(lambda attempt: self._run(again, attempt)) if callable(again) else again,
            )
        except HomeAgentError as error:
            raise as_http(error) from error
        return self._answer(outcome)

    async def _run(self, effect: Effect, attempt: Attempt) -> JsonValue:
        """Run the effect, and return its answer as JSON for the store."""
        try:
            if iscoroutinefunction(effect):
                value = await effect(attempt)
            else:
                value = await run_sync(effect, attempt)
                value = await value if isawaitable(value) else value
            if isinstance(value, Iterator):
                # Both the store and FastAPI read the value.
                value = list(value)
        except (HTTPException, *_KNOWN) as error:
            if isinstance(error, HTTPException) and error.status_code >= 500:
                raise
            value = problem_response(error)
        except EffectFailedError as error:
            error.detail = json_of(error.detail)
            raise
        refuse_deferred(value, "the effect", "return its result")
        self._first = value
        if not isinstance(value, Response):
            # If FastAPI can't encode the value, `arun_once()` records no value. FastAPI raises the encoding error for
            # the reply.
            encoded: Any = object()
            with suppress(Exception):
                encoded = await self._encode(value)
                if self._route.response_field is None:
                    self._first = encoded
            return {_REPLY: {"status": self._response.status_code, "value": encoded}}
        # A streamed body can't be stored, so `arun_once()` records no value.
        body: Any = bytes(value.body).decode("latin-1") if isinstance(getattr(value, "body", None), bytes) else value
        kept: Any = {name: value.headers[name] for name in _KEPT_HEADERS if name in value.headers}
        return {_REPLY: {"status": value.status_code, "body": body, "headers": kept}}

    async def _encode(self, value: Any) -> Any:
        """Return the JSON value that FastAPI sends for the value."""
        options: Any = {name: getattr(self._route, "response_model_" + name) for name in _MODEL_OPTIONS}
        field = self._route.response_field
        encoded = await serialize_response(field=field, response_content=value, **options)
        # Without a response model, FastAPI keeps keys such as numbers. JSON changes the keys into texts.
        return json.loads(json.dumps(encoded)) if field is None else encoded

    def _answer(self, outcome: Outcome) -> Any:
        """Return the answer for the HTTP endpoint. Raise HTTPProblem if the first request's answer is not stored."""
        if not outcome.replayed:
            return self._first
        if outcome.omitted:
            raise HTTPProblem(
                IdempotencyError(
                    "the answer is not stored", device_id=self._scope.device_id, method=self._scope.method
                ),
                detail="The request took effect. Its answer could not be stored.",
            )
        value: Any = outcome.value
        is_reply = isinstance(value, dict) and _REPLY in value
        stored: dict[str, Any] = value[_REPLY] if is_reply else {"status": None, "value": value}
        if "body" in stored:
            response = Response(stored["body"].encode("latin-1"), stored["status"], stored["headers"])
            response.headers["Idempotency-Replayed"] = "true"
            return response
        if stored["status"] is not None:
            self._response.status_code = stored["status"]
        self._response.headers["Idempotency-Replayed"] = "true"
        return self._replayed(stored["value"])

    def _replayed(self, value: JsonValue) -> Any:
        """Return the answer with a stored JSON value as its body."""
        route = self._route
        if route.response_field is None:
            return value
        # If the handler returned the value, FastAPI would validate the value. FastAPI does not validate a Response.
        kind: Any = route.response_class
        kind = kind.value if isinstance(kind, DefaultPlaceholder) else kind
        status = self._response.status_code or route.status_code
        response: Response = kind(value) if status is None else kind(value, status_code=status)
        response.raw_headers.extend(self._response.raw_headers)
        if not is_body_allowed_for_status_code(response.status_code):
            response.body = b""
        return response

    def _unstored_attempt(self) -> Attempt:
        """Return an attempt for a request without a key. The database has no record of the attempt."""
        expires_at = self._database._clock() + self._ttl
        token = token_urlsafe(32)
        return Attempt(1, token, self._scope, expires_at, expires_at, self._ttl, token)


def idempotent(
    required: bool = True,
    *,
    lease: timedelta = timedelta(minutes=1),
    ttl: timedelta = timedelta(hours=24),
    on_abandoned: OnAbandoned = "refuse",
    device: Callable[..., Any] = current_device,
    max_body: int = MAX_BODY,
) -> Callable[..., Awaitable[Once]]:
    """Return a dependency that reads the header Idempotency-Key: `Annotated[Once, Depends(idempotent())]`.

    An idempotency key belongs to one device, HTTP method and route path. A retry must repeat the path, query and body
    of the first request.

    Args:
        required: With `required=True`, a request without a key gets status 400. With `required=False`, a request
            without a key runs, but is not recorded.
        lease: see `Database.run_once()`.
        ttl: time for which a retry gets the answer of the first request.
        on_abandoned: see `Database.run_once()`. The argument also accepts a coroutine function.
        device: dependency that returns the device of the request.
        max_body: largest body in bytes, 1 MiB by default. A larger body gets a reply with status 413. For a form or a
            model, also set FastAPI's argument `max_body_size=`.

    Raises:
        InvalidArgumentError: if an argument is invalid.
    """
    check_options(lease, ttl, on_abandoned, max_body, required)

    async def once(
        request: Request,
        response: Response,
        database: DatabaseDep,
        # Do not write `str | None`. FastAPI handles a union more slowly.
        idempotency_key: str = Header(None, description=_KEY_DESCRIPTIONS[required]),
        caller: Device = Depends(device),  # an annotation can't refer to an argument of the enclosing function
    ) -> Once:
        keys = request.headers.getlist("idempotency-key")
        if not keys and required:
            raise _refused("The header Idempotency-Key is required.")
        if len(keys) > 1:
            raise _refused("The header Idempotency-Key must be sent once.")
        try:
            key = _key_of(keys[0]) if keys else token_urlsafe(16)
            scope = IdempotencyScope(device_id=caller.id, method=route_of(request), key=key)
        except InvalidArgumentError:
            raise _refused("The header Idempotency-Key is invalid.") from None
        return Once(
            database,
            request,
            response,
            scope,
            stored=bool(keys),
            params=await params_of(request, max_body),
            lease=lease,
            ttl=ttl,
            on_abandoned=on_abandoned,
        )

    return once


def check_options(
    lease: timedelta, ttl: timedelta, on_abandoned: OnAbandoned, max_body: int, required: bool = True
) -> None:
    """Raise InvalidArgumentError for an invalid option of a dependency. Otherwise each request would be refused."""
    check_duration(lease, "lease", zero=True)
    check_duration(ttl, "ttl")
    check_on_abandoned(on_abandoned)
    if type(max_body) is not int or max_body < 0:
        raise InvalidArgumentError("max_body must be a whole number of bytes, zero or more")
    if not isinstance(required, bool):
        raise InvalidArgumentError("required must be True or False")


def _refused(detail: str) -> HTTPProblem:
    """Return the reply with status 400 for a wrong header. The caller must raise the reply."""
    return HTTPProblem(InvalidArgumentError(detail), 400, detail)


def _key_of(header: str) -> str:
    """Return the key. The header contains a String of RFC 8941 or plain text."""
    quoted = _QUOTED.fullmatch(header)
    return header if quoted is None else re.sub(r'\\(["\\])', r"\1", quoted[1])


def route_of(request: Request) -> str:
    """Return the method and the path of the route, such as `POST /doors/{door}/open`."""
    # Begin the result with the application's mount path. Leave out a prefix that a proxy removed.
    prefix = request.scope.get("root_path", "").removeprefix(_outer_root(request))
    return f"{request.method} {prefix}{matched_route(request).path}"


def called_in(request: Request) -> set[IdempotencyScope]:
    """Return the scopes of the effects that the request has called. All dependencies of a request share the set."""
    # Do not use `request.scope`: a middleware can send one scope twice.
    called: set[IdempotencyScope] = vars(request).setdefault("_homeagent_called", set())
    return called


def matched_route(request: Request) -> Any:
    """Return the route with its full path and the options of its response."""
    # Since FastAPI 0.137, a route lacks the prefixes and options of `include_router`. Read both from FastAPI's private
    # route context. Without a route context, two routes can have the same path. So a retry must also repeat the
    # request's path (see `params_of()`).
    route = request.scope["route"]
    context = request.scope.get("fastapi", {}).get("effective_route_context")
    return context if getattr(context, "original_route", None) is route else route


def _outer_root(request: Request) -> str:
    """Return the prefix that a proxy removed from the path of the request."""
    root: str = request.scope.get("app_root_path", request.scope.get("root_path", ""))
    return root


def _too_large(max_body: int) -> HTTPProblem:
    """Return the reply with status 413. The caller must raise the reply."""
    detail = f"The body has more than {max_body:,} bytes."
    return HTTPProblem(InvalidArgumentError(detail), 413, detail)


async def read_body(request: Request, max_body: int) -> bytes:
    """Return the body of a request. If the body exceeds `max_body` bytes, raise HTTPProblem with status 413."""
    chunks, size = [], 0
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            size += len(chunk)
            if size > max_body:
                raise _too_large(max_body)
            chunks.append(chunk)
    # Let the HTTP endpoint read the body again. Starlette has no public way to keep a streamed body.
    request._body = b"".join(chunks)
    return request._body


def is_body_gone(request: Request) -> bool:
    """Return True if FastAPI has read the body as a form, so that the body's bytes are gone."""
    # Starlette also creates an empty form for a body that is not a form, but then does not read the body.
    return getattr(request, "_form", None) is not None and not hasattr(request, "_body") and request._stream_consumed


async def params_of(request: Request, max_body: int) -> JsonValue:
    """Return the values that a retry must repeat: path, query and body."""
    if getattr(request, "_form", None) or is_body_gone(request):
        items = (await request.form()).multi_items()
        # A chunked body has no header Content-Length. The sum is smaller than the body.
        sizes = [value.size or 0 if isinstance(value, UploadFile) else len(value.encode()) for _, value in items]
        length = request.headers.get("content-length", "")
        if max(int(length) if length.isdecimal() else 0, sum(sizes)) > max_body:
            raise _too_large(max_body)
        body: JsonValue = [[name, await _text_of(value)] for name, value in items]
    else:
        body = hashlib.sha256(await read_body(request, max_body)).hexdigest()
    return {
        "path": request.scope["path"].removeprefix(_outer_root(request)),
        "query": [list(pair) for pair in sorted(request.query_params.multi_items())],
        "body": body,
    }


async def _text_of(value: UploadFile | str) -> str:
    if isinstance(value, str):
        return value
    digest = hashlib.sha256(await value.read()).hexdigest()
    await value.seek(0)
    return digest
