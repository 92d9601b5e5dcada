"""Make a file name for an id. An id can contain `/`, so an id is not a safe path."""

from __future__ import annotations

import re
from hashlib import sha256

from homeagent.errors import InvalidArgumentError

# Exclude upper-case letters, because a file system can ignore case. Exclude non-ASCII characters, because a file system
# can normalise Unicode.
_PLAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,126}[a-z0-9]|[a-z0-9]")
_OTHER = re.compile(r"[^a-z0-9_-]+")
_PREFIX = 100


def safe_filename(identifier: str) -> str:
    """Return a file name for an id. Different ids have different file names, even if a file system ignores case.
    Unicode normalisation does not change a file name.

    A short, plain id is its own file name. Plain ids contain only `a-z`, `0-9`, `.`, `_` and `-`. Other file names
    consist of a readable part, `~` and the id's SHA-256. An id has the same file name in every release of homeagent.

    Args:
        identifier: id of a row in the store.

    Returns:
        ASCII file name of 1 to 165 bytes. The name has no `/`, leading dot or trailing dot.

    Raises:
        InvalidArgumentError: if the id is empty or is not a str.
    """
    if not isinstance(identifier, str) or not identifier:
        raise InvalidArgumentError("an id must be a str with at least one character")
    if _PLAIN.fullmatch(identifier):
        return identifier
    readable = _OTHER.sub("_", identifier.lower())[:_PREFIX]
    return f"{readable}~{sha256(identifier.encode('utf-8', 'surrogatepass')).hexdigest()}"
