"""Names of files for ids: an id may contain `/` and is not a path."""

from __future__ import annotations

import re
from hashlib import sha256

from homeagent.errors import InvalidArgumentError

__all__ = ["safe_filename"]

# Lower case only: a file system may ignore case. ASCII only: a file system may normalise Unicode.
_PLAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,126}[a-z0-9]|[a-z0-9]")
_OTHER = re.compile(r"[^a-z0-9_-]+")
_PREFIX = 100


def safe_filename(identifier: str) -> str:
    """Return a file name for an id. Different ids have different names.

    A short id of lower-case ASCII letters, digits, `.`, `_` and `-` is its own name. The name of another id is a
    readable part of the id, `~`, and the SHA-256 of the id. The names differ also on a file system that ignores case
    or normalises Unicode. The same id has the same name in every release.

    Args:
        identifier: any id that a row may hold.

    Returns:
        1 to 165 bytes of ASCII, without `/` and without a leading or trailing dot.

    Raises:
        InvalidArgumentError: `identifier` is empty or not a str.
    """
    if not isinstance(identifier, str) or not identifier:
        raise InvalidArgumentError("an id must be a str with at least one character")
    if _PLAIN.fullmatch(identifier):
        return identifier
    readable = _OTHER.sub("_", identifier.lower())[:_PREFIX]
    return f"{readable}~{sha256(identifier.encode('utf-8', 'surrogatepass')).hexdigest()}"
