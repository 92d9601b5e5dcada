"""URLs of a server, and the password in a URL. No server is needed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import URL, make_url

from homeagent import Database, diagnose
from homeagent.errors import ConnectionLostError, HomeAgentError, InvalidArgumentError
from tests.command_line import invoke
from tests.postgresql.server import free_port

SECRET = "S3CRET"
LATIN_1 = "\udce4"  # the form in which `os.environ` gives a byte that is not UTF-8

UNREADABLE: dict[str, str | URL] = {
    "a password that is not UTF-8": f"postgresql://gateway:{SECRET}{LATIN_1}@localhost:1/home",
    "a user that is not UTF-8": f"postgresql://g{LATIN_1}:{SECRET}@localhost:1/home",
    "a host that is not UTF-8": f"postgresql://gateway:{SECRET}@l{LATIN_1}:1/home",
    "an option that is not UTF-8": f"postgresql://gateway:{SECRET}@localhost:1/home?application_name={LATIN_1}",
    "a NUL": f"postgresql://gateway:{SECRET}@localhost:1/home%00",
    "a long label": f"postgresql://gateway:{SECRET}@{'a' * 64}.example:1/home",
    "an empty label": f"postgresql://gateway:{SECRET}@a..example:1/home",
    "ports": f"postgresql://gateway:{SECRET}@localhost:1,2/home",
    "more ports than hosts": f"postgresql://gateway:{SECRET}@/home?host=localhost&port=1,2",
    "a port that is a word": f"postgresql://gateway:{SECRET}@/home?host=localhost&port=x",
    "the password as port": f"postgresql://gateway@localhost:{SECRET}/home",
    "a URL object": URL.create("postgresql", "gateway", SECRET + LATIN_1, "localhost", 1, "home"),
}


def shown(error: BaseException | None) -> Iterator[str]:
    """Yield all texts of an error, its causes and contexts, and the frames of homeagent."""
    if error is None:
        return
    yield f"{error!r} {error.args} {vars(error)}"
    yield repr(getattr(getattr(error, "pgconn", None), "info", None))
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals["__name__"].startswith("homeagent"):
            yield f"{frame.f_code.co_name}: {frame.f_locals}"
    yield from shown(error.__cause__)
    yield from shown(error.__context__)


ACTS: dict[str, Callable[[Any], object]] = {
    "open": Database.open,
    "begin_epoch": Database.begin_epoch,
    "restore": lambda target: Database.restore("backup", target),
    "diagnose": diagnose,
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
@pytest.mark.parametrize("url", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_url_is_refused(act: Callable[[Any], object], url: str | URL) -> None:
    """If a target is an unreadable URL, every function raises InvalidArgumentError without the password."""
    with pytest.raises(InvalidArgumentError) as caught:
        act(url)
    assert not [text for text in shown(caught.value) if SECRET in text]


@pytest.mark.parametrize("command", [("status",), ("init",), ("doctor",), ("copy", "x.db")])
def test_command_refuses_an_unreadable_url_in_one_line(command: tuple[str, ...]) -> None:
    """If the URL is unreadable, the command line prints no traceback and no password."""
    url = UNREADABLE["a password that is not UTF-8"]
    done = invoke(*([*command, url] if command[0] == "copy" else ["--database", url, *command]))
    assert done.exit_code == (2 if command[0] == "doctor" else 1)
    assert SECRET not in done.output
    assert "UTF-8" in done.output


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://gateway:{secret}@127.0.0.1:{port}/home?sslpassword={secret}",
        "postgresql://gateway@127.0.0.1:{port}/home?password={secret}",
        "postgresql://gateway:{secret}@/home?host=127.0.0.1:{port}&host=localhost:{port}",
    ],
)
@pytest.mark.parametrize("make", [str, make_url], ids=["text", "URL"])
def test_refused_connection_shows_no_password(url: str, make: Callable[[str], str | URL]) -> None:
    """If a connection is refused, neither the error nor any frame in its traceback has the password."""
    with pytest.raises(ConnectionLostError, match="Connection refused") as caught:
        Database.open(make(url.format(secret=SECRET, port=free_port())))
    error = caught.value
    assert (error.__cause__, error.__context__) == (None, None)
    assert not [text for text in shown(error) if SECRET in text]
    # The first frame belongs to the test.
    assert SECRET not in str([frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)][1:])


def test_invalid_host_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """If PGHOST has an invalid name, which no check of the URL sees, homeagent's error is raised."""
    monkeypatch.setenv("PGHOST", "a..example")
    with pytest.raises(HomeAgentError) as caught:
        Database.open(f"postgresql://gateway:{SECRET}@/home")
    assert not [text for text in shown(caught.value) if SECRET in text]
