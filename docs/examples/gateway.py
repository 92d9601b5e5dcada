"""Replay two months of a gateway's recorded messages in a few seconds, with an injected clock.

    python docs/examples/gateway.py [--trace FILE] [--database FILE]

Without `--database` the example uses a temporary database. A second run with the same `--database` starts its clock at
the beginning of the trace again. The store then refuses each message whose nonce is still stored. The store accepts the
other messages, although these messages would be too old for a real clock.

The trace has no signatures and no bodies. A real gateway calls `verify_secret` or `verify_proof` before it consumes a
nonce. A proof does not cover the body of a message. Use TLS, or bind the body to the proof, as docs/how-to/devices.md
shows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypedDict

from pydantic import JsonValue
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from homeagent import (
    AgentCreate,
    AgentSessionCreate,
    Database,
    DevicePair,
    DeviceStatus,
    IdempotencyScope,
    Role,
    UnitOfWork,
    errors,
)

TRACE = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "gateway.jsonl.gz"

NONCE_LIFE = timedelta(hours=24)
"""Maximum age of a signed message, and the time for which its nonce is stored."""

RESULT_LIFE = timedelta(hours=24)
"""Time for which a retry gets the stored result."""

SWEEP_EVERY = timedelta(days=1)
METHOD = "message.send"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Event(TypedDict):
    """A received message, which is one line of the trace."""

    at: int
    """Time at which the message was signed and received, in milliseconds since 1970."""
    device: str
    sender: str
    channel: str
    agent: str
    session: str
    nonce: str
    key: str


@dataclass
class Tally:
    """Counts of the messages that a gateway handled, and of their results."""

    events: int = 0
    paired: int = 0
    unapproved_refused: int = 0
    replays_refused: int = 0
    retries_answered: int = 0
    rows_swept: int = 0
    seconds: float = 0.0


def read_trace(path: Path) -> list[Event]:
    """Return the events of a trace. The file has JSON lines, and may be compressed."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class TraceClock:
    """A clock that returns the time of the current event."""

    def __init__(self) -> None:
        self.now = EPOCH

    def __call__(self) -> datetime:
        """Return the time of the current event."""
        return self.now


class Gateway:
    """A gateway that accepts each message once, and stores an answer."""

    def __init__(self, database: Database, clock: TraceClock) -> None:
        self.database = database
        self.clock = clock
        self.tally = Tally()
        self._known: set[str] = set()
        self._next_sweep: datetime | None = None

    def handle(self, event: Event) -> None:
        """Handle one message. For a known device, this method uses two units of work."""
        now = self.clock.now = EPOCH + timedelta(milliseconds=event["at"])
        self.tally.events += 1
        if self._next_sweep is None:
            self._next_sweep = now + SWEEP_EVERY
        elif now >= self._next_sweep:
            swept = self.database.sweep()
            self.tally.rows_swept += swept.nonces + swept.idempotency_keys
            self._next_sweep = now + SWEEP_EVERY
        if event["device"] not in self._known and not self._welcome(event["device"]):
            self.tally.unapproved_refused += 1
            return
        # This call is a separate unit, because a later error must not roll the nonce back.
        if self.database.nonces.consume(event["device"], event["nonce"], expires_at=now + NONCE_LIFE):
            with self.database.unit_of_work() as unit:
                self._answer(unit, event)
        else:
            self.tally.replays_refused += 1

    def _welcome(self, device_id: str) -> bool:
        """Pair and approve a new device, and return whether the device is approved."""
        device = self.database.devices.find_by_id(device_id)
        if device is None:
            # A real gateway returns `shared_secret` to the device.
            device = self.database.pair(DevicePair(id=device_id, role=Role.CLIENT)).device
            self.tally.paired += 1
        if not device.approved:
            try:
                # Approve the device only if the device is still pending and was not paired again.
                self.database.devices.approve(
                    device_id,
                    expected_role=Role.CLIENT,
                    expected_secret_hash=device.shared_secret_hash,
                    expected_status=DeviceStatus.PENDING,
                )
            except errors.ApprovalChangedError:
                return False
        self._known.add(device_id)
        return True

    def _answer(self, unit: UnitOfWork, event: Event) -> None:
        """In one commit, create the agent and the session if they are absent, and store the answer."""
        unit.devices.update_last_seen(event["device"])
        scope = IdempotencyScope(device_id=event["device"], method=METHOD, key=event["key"])
        if unit.agents.find_by_id(event["agent"]) is None:
            path = f"/srv/agents/{event['agent']}"
            unit.agents.create(AgentCreate(id=event["agent"], name=event["agent"].title(), workspace_path=path))
        if unit.sessions.find_by_id(event["session"]) is None:
            unit.sessions.create(
                AgentSessionCreate(
                    session_id=event["session"],
                    agent_id=event["agent"],
                    sender_id=event["sender"],
                    channel_id=event["channel"],
                )
            )
        unit.sessions.touch(event["session"])
        if unit.idempotency_keys.find(scope) is not None:
            # The stored `result` is the answer. The effect does not happen again.
            self.tally.retries_answered += 1
        else:
            answer: JsonValue = {"session": event["session"], "accepted_at": self.clock.now.isoformat()}
            unit.idempotency_keys.insert(scope, answer, ttl=RESULT_LIFE)


def replay(events: Sequence[Event], target: Path, console: Console) -> Table:
    """Replay a trace on the database at `target`, and return a table of counts."""
    clock = TraceClock()
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Database.open(target, clock=clock) as database:
        before = database.status().rows
        gateway = Gateway(database, clock)
        start = time.perf_counter()
        with Progress(*columns, console=console) as progress:
            for event in progress.track(events):
                gateway.handle(event)
        gateway.tally.seconds = time.perf_counter() - start
        return summary(gateway.tally, before, database.status().rows)


def summary(tally: Tally, before: dict[str, int], after: dict[str, int]) -> Table:
    """Return the table of counts that the example prints at the end.

    Args:
        tally: the gateway's counts.
        before: the number of rows per table before the replay.
        after: the number of rows per table after the replay.
    """
    table = Table(title="The gateway's two months")
    table.add_column("what")
    table.add_column("count", justify="right")
    rows = {
        "nonces on record at the start": before["nonces"],
        "events": tally.events,
        "devices paired": tally.paired,
        "devices": after["devices"],
        "agents": after["agents"],
        "sessions": after["sessions"],
        "messages of unapproved devices refused": tally.unapproved_refused,
        "replays refused": tally.replays_refused,
        "retries answered from the store": tally.retries_answered,
        "rows swept": tally.rows_swept,
        "nonces on record at the end": after["nonces"],
        "events a second": round(tally.events / tally.seconds) if tally.seconds else 0,
    }
    for name, count in rows.items():
        table.add_row(name, f"{count:,}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Replay a gateway's messages at their recorded times.")
    parser.add_argument("--trace", type=Path, default=TRACE, help="JSON lines, compressed if the name ends in .gz")
    parser.add_argument("--database", type=Path, help="the database file (default: a temporary file)")
    options = parser.parse_args(arguments)
    console = Console()
    with ExitStack() as stack:
        if options.database is None:
            target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "gateway.db"
        else:
            target = options.database
        table = replay(read_trace(options.trace), target, console)
    console.print(table)


if __name__ == "__main__":
    main()
