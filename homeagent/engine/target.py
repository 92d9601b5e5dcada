"""Resolve the target of `Database.open`: a file, `:memory:` or a server's URL."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from pydantic import SecretStr
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from homeagent.engine.files.database_file import CONTROL_CHARACTER, locate_file
from homeagent.errors import InvalidArgumentError

ENVIRONMENT_VARIABLE = "HOMEAGENT_DATABASE"
DEFAULT_PATH = "~/.homeagent/homeagent.db"

# A server's address that is not a URL, such as "user:password@host/…". An address must not become the path of a new
# store. Error messages would show the password. Do not compile the pattern at import, to save start time.
_ADDRESS = (
    r"(^|\s)(host|hostaddr|port|dbname|user|password|passfile|service|sslmode)\s*="
    r"|^([\w+.-]*//)?[^/]*(:|@[^/]*/)"
    r"|^\s*(postgres|postgresql)(\+\w+)?//"
)
_PLAIN_PATH = re.compile(r"/(?!/)|\.\.?/|~/")
_SQLITE_URI = re.compile(r"\s*file:", re.IGNORECASE)  # https://sqlite.org/uri.html

_NOT_TEXT = re.compile("[\0\ud800-\udfff]")

Given = str | os.PathLike[str] | URL | SecretStr | None
"""The argument of `Database.open`, or the result of `conceal` for the argument."""

_SHOWN_OPTIONS = frozenset({"host", "hostaddr", "port", "sslmode", "target_session_attrs", "user"})


class Target(NamedTuple):
    """The path of a SQLite file or the URL of a server. For `:memory:`, both fields are None."""

    path: Path | None = None
    url: URL | None = None

    @property
    def is_temporary(self) -> bool:
        """True if the target is `:memory:`, which means a temporary file."""
        return self.path is None and self.url is None

    @property
    def location(self) -> str:
        """The target's name for messages. For a server, the name is the URL without passwords."""
        if self.url is not None:
            return presentable_url(self.url)
        return ":memory:" if self.path is None else str(self.path)


class ServerURL(URL):
    """URL of a server. A traceback that shows variables must not show a secret option, such as `sslpassword`."""

    def __repr__(self) -> str:
        return presentable_url(self)


def presentable_url(url: URL) -> str:
    """Remove the password and all options except `_SHOWN_OPTIONS`. An option of libpq can be a password too."""
    kept = {name: value for name, value in url.query.items() if name in _SHOWN_OPTIONS}
    return url.set(query=kept).render_as_string(hide_password=True)


def conceal(target: str | os.PathLike[str] | URL | None) -> Given:
    """Wrap the target, so that a traceback shows no password. The caller must delete the unwrapped target."""
    if isinstance(target, URL):
        return ServerURL(*target)
    return SecretStr(target) if isinstance(target, str) else target


def resolve_target(target: Given) -> Target:
    """Resolve the target of `Database.open`. The message of an InvalidArgumentError does not show the target."""
    try:
        return _read(target)
    except InvalidArgumentError as error:
        problem = str(error)
    if target is None and os.environ.get(ENVIRONMENT_VARIABLE):
        problem = f"the value of {ENVIRONMENT_VARIABLE} is invalid: {problem}"
    # Raise a new error. The first error's traceback can show the password.
    raise InvalidArgumentError(problem)


def _read(target: Given) -> Target:
    if isinstance(target, SecretStr):
        target = target.get_secret_value()
    if target is None:
        target = os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_PATH
    if isinstance(target, str) and CONTROL_CHARACTER.search(target):
        raise InvalidArgumentError(
            "the database's name holds a control character, such as a line break: remove the character"
        )
    if isinstance(target, str) and "://" in target:
        _refuse_sqlite_uri(target)
        try:
            target = make_url(target)
        except (ArgumentError, ValueError):
            raise InvalidArgumentError("the database URL can't be read: see docs/postgresql.md for its form") from None
    if isinstance(target, URL):
        return _read_url(target)
    if target == ":memory:":
        return Target()
    refuse_address(target)
    return _named_file(target)


def refuse_address(path: object) -> None:
    """Raise InvalidArgumentError for a server's address or a SQLite URI. The message does not show the path."""
    if not isinstance(path, str) or _PLAIN_PATH.match(path):
        return
    _refuse_sqlite_uri(path)
    if re.search(_ADDRESS, path, re.IGNORECASE):
        raise InvalidArgumentError(
            "the path looks like the address of a server: a database's URL has the form postgresql://USER@HOST/NAME; "
            "if it is a path, begin it with ./ or pass a Path"
        )


def _refuse_sqlite_uri(path: str) -> None:
    """Raise InvalidArgumentError if the path looks like a SQLite URI (`file:…`). The message omits the path."""
    if _SQLITE_URI.match(path):
        raise InvalidArgumentError(
            "the path is a SQLite URI, which is not supported: name the path alone; to read without writing, open a "
            "unit with read_only=True; if it is a path, begin it with ./ or pass a Path"
        )


def _named_file(path: str | os.PathLike[str]) -> Target:
    """Return the target for the path of a SQLite file. Raise InvalidArgumentError if the path ends with a slash."""
    where = locate_file(path)
    text = os.fspath(path)
    if text.endswith("/"):
        # Check the given text, because `locate_file()` removes a slash at the end.
        raise InvalidArgumentError(f"{text!r} names a directory: name a file in it")
    return Target(path=where)


def _read_url(url: URL) -> Target:
    backend = url.get_backend_name()
    if backend == "sqlite":
        if url.query:
            raise InvalidArgumentError("a sqlite URL can't have a query: the store sets the options; remove the query")
        if url.host or url.username or url.password or url.port:
            raise InvalidArgumentError(
                "a sqlite URL has no host: write sqlite:///relative.db or sqlite:////absolute.db"
            )
        if url.database in {None, "", ":memory:"}:
            return Target()
        _refuse_sqlite_uri(str(url.database))
        return _named_file(str(url.database))
    if backend == "postgresql":
        return _read_server_url(url.set(drivername="postgresql+psycopg"))
    raise InvalidArgumentError(f"no engine for {backend!r}: use a path, sqlite:/// or postgresql://")


def _read_server_url(url: URL) -> Target:
    values = [value for given in url.query.values() for value in ((given,) if isinstance(given, str) else given)]
    parts = (url.username, str(url.password or ""), url.host, url.database, *url.query, *values)
    if any(_NOT_TEXT.search(part) for part in parts if part):
        raise InvalidArgumentError(
            "the database URL holds a NUL or a byte that is not UTF-8: write the URL in UTF-8, and percent-encode "
            "the characters of the user's name and the password"
        )
    try:
        hosts = url.get_dialect()().create_connect_args(url)[1].get("host", "")
        for host in hosts.split(","):
            # A host that begins with "/" or "@" is a Unix socket.
            if not host.startswith(("/", "@")):
                host.encode("idna")
    except (ArgumentError, ValueError):
        raise InvalidArgumentError(
            "the database URL has a host name that can't exist, a port that is not a number, or not as many ports as "
            "hosts: write ?host=a.example:5432&host=b.example:5432, see docs/postgresql.md"
        ) from None
    return Target(url=ServerURL(*url))
