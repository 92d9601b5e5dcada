"""A gateway that lives through two months in a few seconds: it replays a recorded trace at the trace's own times.

    python docs/examples/gateway.py [--trace FILE] [--database FILE]

Without `--database` it works on a new database in a temporary directory, which is removed at the end. With it the
file stays. A second run over the same file refuses every message whose nonce the first run left on record: the clock
starts again at the beginning of the trace, and an injected clock is believed, so all of those are live once more.
The nonces that were swept meanwhile are gone, and nothing tells their messages from new ones. A real clock does not
step back by two months: there a message of that age is refused for its age.

The trace holds no signatures. A real gateway calls `verify_secret` or `verify_proof` before it consumes a nonce.
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
"""How old a signed message may be. Until then its nonce must be remembered."""

RESULT_LIFE = timedelta(hours=24)
"""How long a retry is answered with the stored result."""

SWEEP_EVERY = timedelta(days=1)
METHOD = "message.send"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Event(TypedDict):
    """One line of the trace: a signed message that came in."""

    at: int
    """Milliseconds since the epoch: when it was signed, and when it came in."""
    device: str
    sender: str
    channel: str
    agent: str
    session: str
    nonce: str
    key: str


@dataclass
class Tally:
    """What the gateway did."""

    events: int = 0
    paired: int = 0
    unapproved_refused: int = 0
    replays_refused: int = 0
    retries_answered: int = 0
    rows_swept: int = 0
    seconds: float = 0.0


def read_trace(path: Path) -> list[Event]:
    """Return the events of a trace: JSON lines, compressed or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class TraceClock:
    """The clock of the replay: it shows the time of the event at hand."""

    def __init__(self) -> None:
        self.now = EPOCH

    def __call__(self) -> datetime:
        """Return that time."""
        return self.now


class Gateway:
    """Lets messages in, each once, and answers them."""

    def __init__(self, database: Database, clock: TraceClock) -> None:
        self.database = database
        self.clock = clock
        self.tally = Tally()
        self._known: set[str] = set()
        self._next_sweep: datetime | None = None

    def handle(self, event: Event) -> None:
        """Take one message: three units of work at most, and two for a device that is known."""
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
        # In a unit of its own, which commits before anything else is done: whatever fails later, and rolls back, the
        # message can't be used a second time.
        with self.database.unit_of_work() as unit:
            fresh = unit.nonces.consume(event["device"], event["nonce"], expires_at=now + NONCE_LIFE)
        if fresh:
            with self.database.unit_of_work() as unit:
                self._answer(unit, event)
        else:
            self.tally.replays_refused += 1

    def _welcome(self, device_id: str) -> bool:
        """Pair and approve a new device, and return whether the device is approved."""
        with self.database.unit_of_work(read_only=True) as unit:
            device = unit.devices.find_by_id(device_id)
        if device is None:
            # Pairing hashes the secret outside any unit of work. The device would keep `shared_secret`.
            device = self.database.pair(DevicePair(id=device_id, role=Role.CLIENT)).device
            self.tally.paired += 1
        if not device.approved:
            try:
                with self.database.unit_of_work() as unit:
                    # What an admin looked at: no device that took its place since, and no revoked device.
                    unit.devices.approve(
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
        """Find or make what the message speaks of, and answer it. All of it is one commit."""
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
            # Its `result` is the answer, and the message has no second effect.
            self.tally.retries_answered += 1
        else:
            answer: JsonValue = {"session": event["session"], "accepted_at": self.clock.now.isoformat()}
            unit.idempotency_keys.insert(scope, answer, ttl=RESULT_LIFE)


def replay(events: Sequence[Event], target: Path, console: Console) -> Table:
    """Replay a trace on the database at `target`, and return the table that tells what came of it."""
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
    """Return the table that is shown at the end.

    Args:
        tally: what was done.
        before: the rows of each table before the replay.
        after: the rows of each table after it.
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
    parser = argparse.ArgumentParser(description="Replay a gateway's trace at its own times.")
    parser.add_argument("--trace", type=Path, default=TRACE, help="JSON lines, compressed where it ends in .gz")
    parser.add_argument("--database", type=Path, help="a file to keep; without it a temporary one is made")
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
