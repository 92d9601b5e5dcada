"""Session files in the shapes of three public gateways, with other names and contents, become an index of sessions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent import AgentSession, AgentSessionUpdate, Database
from tests.conftest import FakeClock, add_agent

Route = dict[str, str | None]


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file. A killed gateway can leave a line without an end, which is not read."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def epoch(seconds: float) -> datetime:
    """Return the timestamp of a number of seconds. The models refuse numbers, whose unit is unknown."""
    return datetime.fromtimestamp(seconds, UTC)


# The first gateway keeps a map of routes, and a transcript for each conversation. After "/new" the map names another
# conversation, and the earlier transcript stays.

KEY = "agent:{agent}:telegram:group:-1001987654321"


def write_map_of_routes(folder: Path) -> None:
    """Write `sessions.json` and the transcripts."""
    entries = {
        "agent:{agent}:main": {"sessionId": "5b0e1c7a-main", "updatedAt": 1767000000123, "chatType": "direct"},
        KEY: {
            "sessionId": "c41f77d2-live",
            "updatedAt": 1767100000456,
            "displayName": "telegram:g-werkstatt 🔧",
            "chatType": "group",
            "inputTokens": 1200,
            "outputTokens": 88,
            "totalTokens": 1288,
        },
        KEY + ":topic:12": {"sessionId": "9ad3f00c-topic", "updatedAt": 1767050000000, "totalTokens": None},
        "agent:{agent}:cron:0f8c": {"sessionId": "e7780b19-cron", "updatedAt": 1766900000000},
    }
    folder.mkdir()
    stored = {key.format(agent="ada"): entry for key, entry in entries.items()}
    (folder / "sessions.json").write_text(json.dumps(stored))
    begun = {"5b0e1c7a-main": "2025-12-01", "c41f77d2-live": "2025-12-20", "9ad3f00c-topic": "2025-12-21"}
    for name, day in {**begun, "e7780b19-cron": "2025-12-27", "1a2b3c4d-before": "2025-12-02"}.items():
        header = {"type": "session", "version": 2, "id": name, "timestamp": f"{day}T08:00:00.000Z", "cwd": "/srv/ada"}
        message = {"type": "message", "timestamp": f"{day}T08:00:07.250Z", "message": {"role": "user", "content": []}}
        write_lines(folder / f"{name}.jsonl", header, message)
    with (folder / "1a2b3c4d-before.jsonl").open("a") as transcript:
        transcript.write('{"type": "message", "timest')


def read_map_of_routes(folder: Path) -> Iterator[AgentSession]:
    """Yield the sessions of the map, and the conversations that the map no longer names."""
    entries = json.loads((folder / "sessions.json").read_text())
    by_id = {entry["sessionId"]: (key, entry) for key, entry in entries.items()}
    for path in folder.glob("*.jsonl"):
        header, *rest = read_lines(path)
        key, entry = by_id.get(header["id"], (f"agent:ada:earlier:{header['id']}", {}))
        _, agent, channel, *peer = key.split(":", 3)
        yield AgentSession(
            session_id=header["id"],
            agent_id=agent,
            channel_id=":".join([channel, *peer]),
            created_at=header["timestamp"],
            last_active_at=epoch(entry["updatedAt"] / 1000) if entry else rest[-1]["timestamp"],
            metadata={name: value for name, value in entry.items() if name not in ("sessionId", "updatedAt")},
        )


# The second gateway has a folder for each project. A transcript has a line without a timestamp, and a conversation that
# was continued begins with lines of the conversation before.


def write_projects(folder: Path) -> None:
    """Write the transcripts of two projects."""

    def line(session: str, cwd: str, at: str, parent: str | None, **more: Any) -> dict[str, Any]:
        return {"parentUuid": parent, "sessionId": session, "cwd": cwd, "type": "user", "timestamp": at, **more}

    hub, site = "/srv/home hub", "/srv/site"
    first = [
        line("7d1f0a52", hub, "2025-11-02T08:00:00.000Z", None, message={"role": "user", "content": "Guten Tag ☀"}),
        line("7d1f0a52", hub, "2025-11-02T08:00:09.125Z", "u-1", isSidechain=True),
    ]
    write_lines(folder / "-srv-home-hub" / "7d1f0a52.jsonl", *first)
    write_lines(
        folder / "-srv-home-hub" / "0b6a7c11.jsonl",
        {"type": "summary", "summary": "Lights in the hall", "leafUuid": "u-2"},
        *first,
        line("0b6a7c11", hub, "2025-11-03T07:30:00.5Z", "u-2"),
    )
    write_lines(folder / "-srv-site" / "f00dfeed.jsonl", line("f00dfeed", site, "2025-11-04T00:00:00+01:00", None))


def read_projects(folder: Path) -> Iterator[AgentSession]:
    """Yield a session for each transcript, with the folder of the project as its channel."""
    for path in folder.glob("*/*.jsonl"):
        lines = read_lines(path)
        times = [line["timestamp"] for line in lines if line.get("sessionId") == path.stem]
        yield AgentSession(
            session_id=path.stem,
            agent_id="ada",
            channel_id=next(line["cwd"] for line in lines if "cwd" in line),
            created_at=times[0],
            last_active_at=times[-1],
            metadata={"title": next((line["summary"] for line in lines if line["type"] == "summary"), None)},
        )


# The third gateway has a file for each chat. Its times are seconds, and "/reset" moves the file to the archive.


def write_chats(folder: Path) -> None:
    """Write the present chats and an archived chat."""

    def chat(path: str, chat_id: int, thread_id: int | None, *times: float, user: str | None = None) -> None:
        messages = [{"role": "user", "text": f"№ {at}", "at": at} for at in times]
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        content = {"chat_id": chat_id, "thread_id": thread_id, "user": user, "messages": messages}
        (folder / path).write_text(json.dumps(content))

    chat("-100777.json", -100777, None, 1762156800, 1762156860.75)
    chat("archive/-100777.1762070400.json", -100777, None, 1762070400, 1762070460)
    chat("-100777_5.json", -100777, 5, 1762156801)
    chat("4711.json", 4711, None, 1762000000.001, user="+49 170 1234567")


def read_chats(folder: Path) -> Iterator[AgentSession]:
    """Yield a session for each file. The path in the folder is the id."""
    for path in folder.rglob("*.json"):
        chat = json.loads(path.read_text())
        thread = "" if chat["thread_id"] is None else f"/{chat['thread_id']}"
        yield AgentSession(
            session_id=str(path.relative_to(folder)),
            agent_id="ada",
            sender_id=chat["user"],
            channel_id=f"telegram:{chat['chat_id']}{thread}",
            created_at=epoch(chat["messages"][0]["at"]),
            last_active_at=epoch(chat["messages"][-1]["at"]),
            metadata=len(chat["messages"]),
        )


GROUP = "telegram:group:-1001987654321"
SHAPES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Iterator[AgentSession]], dict[str, Route]]] = {
    "a map of routes": (
        write_map_of_routes,
        read_map_of_routes,
        {
            "5b0e1c7a-main": {"channel_id": "main"},
            "c41f77d2-live": {"channel_id": GROUP},
            "9ad3f00c-topic": {"channel_id": GROUP + ":topic:12"},
            "e7780b19-cron": {"channel_id": "cron:0f8c"},
        },
    ),
    "a folder for each project": (
        write_projects,
        read_projects,
        {"0b6a7c11": {"channel_id": "/srv/home hub"}, "f00dfeed": {"channel_id": "/srv/site"}},
    ),
    "a file for each chat": (
        write_chats,
        read_chats,
        {
            "-100777.json": {"channel_id": "telegram:-100777"},
            "-100777_5.json": {"channel_id": "telegram:-100777/5"},
            "4711.json": {"channel_id": "telegram:4711", "sender_id": "+49 170 1234567"},
        },
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_files_of_other_gateways(database: Database, clock: FakeClock, tmp_path: Path, shape: str) -> None:
    """Files are indexed in any order, `resolve` returns each live conversation, and `start` and `move` change it."""
    write, read, live = SHAPES[shape]
    write(tmp_path / "files")
    add_agent(database)
    sessions = sorted(read(tmp_path / "files"), key=lambda session: session.session_id)
    count = len(sessions)
    for order in (sessions, sessions[::-1]):
        assert database.sessions.index(iter(order)) == count
        for session_id, route in live.items():
            assert database.sessions.resolve(agent_id="ada", **route).session_id == session_id
    stored = {row.session_id: row for row in database.sessions.list()}
    for session in sessions:
        row = stored[session.session_id]
        assert (row.created_at, row.last_active_at) == (session.created_at, session.last_active_at)
        assert row.metadata_ == session.metadata_
        assert row.created_at <= row.last_active_at < clock.now
    # "/new", and a message to the new conversation. The gateway then indexes its files again.
    for number, (session_id, route) in enumerate(live.items()):
        clock.advance(timedelta(seconds=1))
        started = database.sessions.start(agent_id="ada", **route)
        assert database.sessions.index(read(tmp_path / "files")) == count
        assert database.sessions.resolve(agent_id="ada", **route) == started
        assert database.sessions.get(session_id).metadata_ == stored[session_id].metadata_
        # The group becomes another group. The conversation before "/new" then continues on the old route.
        moved = database.sessions.move(started.session_id, channel_id=f"moved:{number}")
        database.sessions.update(moved.session_id, AgentSessionUpdate(metadata={"from": route["channel_id"]}))
        assert database.sessions.resolve(
            agent_id="ada", **{**route, "channel_id": f"moved:{number}"}
        ) == moved.model_copy(update={"metadata_": {"from": route["channel_id"]}})
        assert database.sessions.resolve(agent_id="ada", **route).session_id == session_id
    assert len(database.sessions.list()) == count + len(live)
