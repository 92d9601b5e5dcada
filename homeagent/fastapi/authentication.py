"""Authenticate devices by the header Authorization (RFC 6750 and RFC 7617)."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import Annotated
from urllib.parse import unquote

from fastapi import Security
from fastapi.openapi.models import HTTPBase
from fastapi.openapi.models import SecurityBase as OpenAPIScheme
from fastapi.security.base import SecurityBase
from pydantic import SecretStr
from starlette.requests import HTTPConnection

from homeagent.errors import AccessDeniedError, AuthenticationError, HomeAgentError, InvalidArgumentError
from homeagent.fastapi.lifespan import DatabaseDep
from homeagent.fastapi.problems import HTTPProblem, as_http
from homeagent.frame_locals import clears_locals
from homeagent.handshake import REFUSALS
from homeagent.models.device import Device, Role
from homeagent.models.types import check_searched

_LONGEST_HEADER = 8_192


class _BasicScheme(SecurityBase):
    """Entry of `securitySchemes` in the OpenAPI document."""

    scheme_name = "device-basic"
    model = HTTPBase(
        scheme="basic",
        description="The user name is the percent-encoded id of the device, and the password is the secret.",
    )

    async def __call__(self) -> None:
        """Do nothing."""


_BASIC = _BasicScheme()


@clears_locals
def bearer_token(device_id: str, secret: SecretStr | str) -> str:
    """Return the text that a device sends in the header `Authorization: Bearer …`. If an argument is not a text, or has
    a lone surrogate, raise InvalidArgumentError.
    """
    plain = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
    texts = check_searched(device_id, "device_id"), check_searched(plain, "secret")
    try:
        id_part, secret_part = (base64.urlsafe_b64encode(text.encode()).decode() for text in texts)
    except UnicodeEncodeError:
        refusal = InvalidArgumentError("device_id or secret has a lone surrogate: remove it")
    else:
        return f"{id_part.rstrip('=')}.{secret_part.rstrip('=')}"
    # Do not raise inside the `except` block. The error's `__context__` would show the secret.
    raise refusal


class _CurrentDevice(SecurityBase):
    """Class that is both a FastAPI dependency and a security scheme. A separate security scheme would make each request
    slower.
    """

    scheme_name: str = "device-bearer"
    model: OpenAPIScheme = HTTPBase(
        scheme="bearer", description="base64url(id of the device) + '.' + base64url(secret), without padding"
    )

    async def __call__(
        self, connection: HTTPConnection, database: DatabaseDep, _basic: Annotated[None, Security(_BASIC)]
    ) -> Device:
        """Return the approved device of the request. A refusal is an HTTPProblem with status 401, 403, 429 or 503."""
        presented = _credentials(connection.headers.getlist("authorization"))
        if presented is None:
            raise HTTPProblem(AuthenticationError("the request has no credentials that can be read"))
        try:
            checked = await database.acheck_secret(*presented)
        except InvalidArgumentError:
            # No device can have an invalid id or secret.
            raise HTTPProblem(AuthenticationError("the id or the secret is invalid")) from None
        except HomeAgentError as error:
            raise as_http(error) from error
        if checked.device is None:
            raise HTTPProblem(AuthenticationError("the secret is wrong, or the device does not exist"))
        if not checked:
            raise HTTPProblem(AccessDeniedError(f"the device is {checked.status}"), detail=REFUSALS[checked.status])
        return checked.device


current_device: _CurrentDevice = _CurrentDevice()
"""Dependency: the approved device that sent the request. Otherwise the reply has status 401, 403, 429 or 503."""

CurrentDevice = Annotated[Device, Security(current_device)]
"""Dependency: the approved device that sent the request."""


def require_role(*roles: Role) -> Callable[[Device], Awaitable[Device]]:
    """Return a dependency that returns the device of the request. Use the dependency as `Annotated[Device,
    Depends(require_role(Role.ADMIN))]`. A device with another role gets a reply with status 403. A call without a
    role, or with a value that is not a role, raises InvalidArgumentError.
    """
    if not roles:
        raise InvalidArgumentError("require_role needs a role, such as Role.ADMIN")
    try:
        allowed = frozenset(map(Role, roles))
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from None

    async def check(device: CurrentDevice) -> Device:
        if device.role not in allowed:
            raise HTTPProblem(
                AccessDeniedError("the role of the device does not suffice"),
                detail="The role of the device does not allow this request.",
            )
        return device

    return check


@clears_locals
def _credentials(headers: list[str]) -> tuple[str, SecretStr] | None:
    """Return the id and secret of the header Authorization. For a missing or malformed header, return None."""
    if len(headers) != 1 or len(headers[0]) > _LONGEST_HEADER:
        return None
    scheme, _, value = headers[0].partition(" ")
    try:
        if scheme.lower() == "bearer":
            id_part, _, secret_part = value.strip().partition(".")
            device_id, secret = (_decoded(part, b"-_") for part in (id_part, secret_part))
        elif scheme.lower() == "basic":
            user, _, secret = _decoded(value.strip(), b"+/").partition(":")
            device_id = unquote(user, errors="strict")
        else:
            return None
    except ValueError:  # raised for invalid base64 and for invalid UTF-8
        return None
    return device_id, SecretStr(secret)


def _decoded(text: str, alternatives: bytes) -> str:
    # Do not require padding (RFC 7515, appendix C).
    unpadded = text.rstrip("=")
    return base64.b64decode(unpadded + "=" * (-len(unpadded) % 4), alternatives, validate=True).decode()
