"""Make a file name for an id. An id can contain `/`, so an id must not be used as a path."""

from __future__ import annotations

import re
from hashlib import sha256

from homeagent.errors import InvalidArgumentError

# The pattern excludes upper-case letters, because a file system can ignore case. The pattern excludes characters
# outside of ASCII, because a file system can normalise Unicode.
_PLAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,126}[a-z0-9]|[a-z0-9]")
_OTHER = re.compile(r"[^a-z0-9_-]+")
_PREFIX = 100


def safe_filename(identifier: str) -> str:
    """Return a file name for an id. Different ids have different file names, even on a file system that ignores case or
    normalises Unicode.

    If a short id contains only lower-case ASCII letters, digits, `.`, `_` and `-`, the file name is the id itself. For
    any other id, the file name consists of a readable part of the id, the character `~` and the SHA-256 of the id. An
    id has the same file name in every release of homeagent.

    Args:
        identifier: id of a row in the store.

    Returns:
        File name of 1 to 165 bytes of ASCII, without `/` and without a leading or trailing dot.

    Raises:
        InvalidArgumentError: if the id is empty or is not a str.
    """
    if not isinstance(identifier, str) or not identifier:
        raise InvalidArgumentError("an id must be a str with at least one character")
    if _PLAIN.fullmatch(identifier):
        return identifier
    readable = _OTHER.sub("_", identifier.lower())[:_PREFIX]
    return f"{readable}~{sha256(identifier.encode('utf-8', 'surrogatepass')).hexdigest()}"
