"""Environment variables supply the omitted arguments of `Database.open` (see docs/settings.md). An empty variable
counts as absent.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Literal, cast

from homeagent.errors import InvalidArgumentError

Durability = Literal["full", "normal"]

MAX_POOL_SIZE = 1000


class _Text(str):
    __slots__ = ()


class _Number(int):
    __slots__ = ()


# Defaults in the signature of `Database.open`. homeagent detects an omitted argument by the default object's identity.
# Python can use one object for equal texts or numbers. With the class `_Text` or `_Number`, a default is always a new
# object.
BUSY_TIMEOUT = timedelta(seconds=30)
DURABILITY = cast("Durability", _Text("full"))
POOL_SIZE: int = _Number(10)


def busy_timeout_or_default(given: timedelta) -> timedelta:
    """Return the argument. Without an argument, return the value of the variable HOMEAGENT_BUSY_TIMEOUT."""
    text = os.environ.get("HOMEAGENT_BUSY_TIMEOUT") if given is BUSY_TIMEOUT else None
    if not text:
        return given
    if re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,6})?", text) is None:
        raise InvalidArgumentError("HOMEAGENT_BUSY_TIMEOUT must be a number of seconds, such as 30 or 0.5")
    return timedelta(seconds=float(text))


def durability_or_default(given: Durability) -> Durability:
    """Return the argument. Without an argument, return the value of the variable HOMEAGENT_DURABILITY."""
    text = (os.environ.get("HOMEAGENT_DURABILITY") if given is DURABILITY else None) or given
    if text not in ("full", "normal"):
        name = "durability" if text is given else "HOMEAGENT_DURABILITY"
        raise InvalidArgumentError(f"{name} must be 'full' or 'normal'")
    return "full" if text == "full" else "normal"


def pool_size_or_default(given: int) -> int:
    """Return the argument. Without an argument, return the value of the variable HOMEAGENT_POOL_SIZE."""
    if given is not POOL_SIZE:
        return given
    text = os.environ.get("HOMEAGENT_POOL_SIZE") or str(int(given))
    if re.fullmatch("[0-9]{1,4}", text) is None or not 1 <= int(text) <= MAX_POOL_SIZE:
        raise InvalidArgumentError(f"HOMEAGENT_POOL_SIZE must be a whole number from 1 to {MAX_POOL_SIZE:,}")
    return int(text)
