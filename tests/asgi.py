"""A synchronous client of an ASGI application, without a server and without the application's lifespan."""

from __future__ import annotations

from typing import Any

import anyio
import httpx
from fastapi import FastAPI

from homeagent import Database


class Client:
    """Send requests to an application, each in an event loop of its own.

    Args:
        app: the application.
        database: the database that the application's lifespan would open.
        raises: whether an exception of the application reaches the test.
    """

    def __init__(self, app: FastAPI, database: Database | None = None, *, raises: bool = True) -> None:
        self.headers: dict[str, str] = {}
        self.app = app
        self._raises = raises
        if database is not None:
            app.state.homeagent_database = database

    def request(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send a request, and return the response with its body."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=self._raises)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://gateway", headers=self.headers
            ) as client:
                return await client.request(method, path, **request)

        return anyio.run(send)

    def get(self, path: str, **request: Any) -> httpx.Response:
        """Send a GET request."""
        return self.request("GET", path, **request)

    def post(self, path: str, **request: Any) -> httpx.Response:
        """Send a POST request."""
        return self.request("POST", path, **request)
