"""The pieces of work: which calls are made, and what must come of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.contestants import ContenderError, Process
from tests.benchmarks.data import DAY, METHOD, RESULT, Rows, now_ms

__all__ = ["INDEXED", "SLICES", "Call", "Work", "expect", "works"]

Call = list[Any]
"""The arguments of one call, as JSON carries them."""

SESSIONS_LISTED = 50
DEVICES_THAT_SEND = 10
MOST = 20_000
"""How many calls make a sample at the most: some are quick, and nonces have a bound for each device."""

SLICES = 8
"""The devices are parted among the samples on one file; the last part is kept for the check."""


@dataclass(frozen=True)
class Work:
    """One operation.

    Attributes:
        name: the contender's method.
        title: what the reader is told.
        calls: makes arguments: given the rows, a seeded generator, which sample it is and how many are wanted. No two
            samples write the same rows.
        check: has a contender do it, and raises where its answers are wrong.
        growth: which table grows by how many rows with each call.
        once: whether a call is long enough to be a sample by itself.
        scarce: whether a call can't be made twice: a device is written once a minute, so each needs its own.
    """

    name: str
    title: str
    calls: Callable[[Rows, random.Random, int, int], list[Call]]
    check: Callable[[Process, Rows], None]
    growth: tuple[str, int] | None = None
    once: bool = False
    scarce: bool = False

    def limit(self, rows: Rows) -> int:
        """Return how many calls there can be in one sample."""
        if self.once:
            return 1
        return max(1, rows.count // SLICES) if self.scarce else MOST


def expect(process: Process, what: str, found: Any, expected: Any) -> None:
    """Compare an answer with what it must be; of a row, the fields that are told.

    Raises:
        ContenderError: it is another one.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        found = {name: found.get(name) for name in expected}
    if found != expected:
        raise ContenderError(process.contestant.name, f"answers {what} with {found!r}, and not {expected!r}")


def ask(process: Process, work: str, *calls: Call) -> list[Any]:
    """Return the answers to some calls."""
    answers: list[Any] = process.request("ask", work=work, arguments=list(calls))["answers"]
    return answers


# Device by id


def _device_calls(rows: Rows, chance: random.Random, sample: int, count: int) -> list[Call]:
    return [[rows.device_id(chance.randrange(rows.count))] for _ in range(count)]


def _check_device(process: Process, rows: Rows) -> None:
    numbers = [0, rows.count // 3, rows.count - 1]
    found = ask(process, "device", *([rows.device_id(number)] for number in numbers), ["device-none"])
    for answer, number in zip(found, numbers, strict=False):
        expect(process, f"device {number}", answer, rows.device(number))
    expect(process, "an absent device", found[-1], None)


# Last-seen write


def _seen_calls(rows: Rows, chance: random.Random, sample: int, count: int) -> list[Call]:
    first = sample * (rows.count // SLICES)
    return [[rows.device_id((first + number) % rows.count)] for number in range(count)]


def _check_seen(process: Process, rows: Rows) -> None:
    # The last eighth is kept for this.
    call = [rows.device_id(rows.count - 1)]
    before = now_ms()
    expect(
        process, "a device that was not seen", ask(process, "seen", call, call, ["device-none"]), [True, False, False]
    )
    (device,) = ask(process, "device", call)
    seen = device["last_seen_at"]
    if seen is None or not before <= seen <= now_ms():
        raise ContenderError(process.contestant.name, f"wrote another instant: {seen}")


# Nonce consume


def _nonce_calls(rows: Rows, chance: random.Random, sample: int, count: int) -> list[Call]:
    until = now_ms() + DAY
    return [
        [rows.device_id(number % DEVICES_THAT_SEND), f"{chance.getrandbits(128):032x}", until]
        for number in range(count)
    ]


def _check_nonce(process: Process, rows: Rows) -> None:
    until = now_ms() + DAY
    fresh = [rows.device_id(0), "nonce-checked", until]
    another = [rows.device_id(1), "nonce-checked", until]
    stored = [rows.device_id(0), f"{0:032x}", until]
    found = ask(process, "consume", fresh, fresh, another, stored)
    expect(process, "a nonce, its replay, another device's and one on record", found, [True, False, True, False])


# Idempotency keys


def _find_calls(rows: Rows, chance: random.Random, sample: int, count: int) -> list[Call]:
    return [list(rows.key(chance.randrange(rows.count))) for _ in range(count)]


def _check_find(process: Process, rows: Rows) -> None:
    found = ask(process, "find_key", list(rows.key(rows.count // 2)), [rows.device_id(0), METHOD, "key-none"])
    expect(process, "a key on record", found[0], {"result": RESULT, "key": rows.key(rows.count // 2)[2]})
    expect(process, "an absent key", found[1], None)


def _key_calls(rows: Rows, chance: random.Random, sample: int, count: int) -> list[Call]:
    return [
        [rows.device_id(number % DEVICES_THAT_SEND), METHOD, f"{chance.getrandbits(96):024x}", RESULT]
        for number in range(count)
    ]


def _check_written_key(process: Process, rows: Rows, work: str) -> None:
    result = {"work": work, "deep": [1, 2.5, "ü", None]}
    fresh = [rows.device_id(0), METHOD, f"key-{work}", result]
    found = ask(process, work, fresh, fresh, [*rows.key(0), result])
    expect(process, f"{work}, again, and one on record", found, [True, False, False])
    (row,) = ask(process, "find_key", fresh[:3])
    now = now_ms()
    expect(process, f"a key after {work}", row, {"result": result, "state": "completed"})
    if not now + DAY - 60_000 <= row["expires_at"] <= now + DAY:
        raise ContenderError(process.contestant.name, f"keeps a result until {row['expires_at']}")


# Sessions


def _session_calls(rows: Rows, chance: random.Random, sample: int, count: int) -> list[Call]:
    return [[rows.agent_id(chance.randrange(rows.agents)), SESSIONS_LISTED] for _ in range(count)]


def _check_sessions(process: Process, rows: Rows) -> None:
    agent = rows.agents // 2
    (found,) = ask(process, "agent_sessions", [rows.agent_id(agent), SESSIONS_LISTED])
    expected = rows.sessions_of(agent, SESSIONS_LISTED)
    expect(process, "how many sessions", len(found), len(expected))
    for row, wanted in zip(found, expected, strict=True):
        expect(process, "a session", row, wanted)


def _index_rows(rows: Rows, prefix: str, count: int) -> list[list[Any]]:
    return [
        [
            f"{prefix}-{number:06}",
            rows.agent_id(number % rows.agents),
            f"{prefix}-sender-{number}",
            None if number % 3 else "main",
            rows.since,
            # Before every other one of its agent, so that the lists stay as they were.
            rows.since - 1 - number,
        ]
        for number in range(count)
    ]


def _index_calls(size: int) -> Callable[[Rows, random.Random, int, int], list[Call]]:
    def calls(rows: Rows, chance: random.Random, sample: int, count: int) -> list[Call]:
        return [[_index_rows(rows, f"index-{sample}-{number}", size)] for number in range(count)]

    return calls


def _check_index(process: Process, rows: Rows) -> None:
    expect(process, "an index", ask(process, "index", [_index_rows(rows, "checked", 20)]), [20])
    agent = rows.agents - 1
    (found,) = ask(process, "agent_sessions", [rows.agent_id(agent), 2**31 - 1])
    names = {row["session_id"] for row in found if row["session_id"].startswith("checked-")}
    wanted = {f"checked-{number:06}" for number in range(20) if number % rows.agents == agent}
    expect(process, "what was indexed", names, wanted)


INDEXED = 10_000


def works(indexed: int = INDEXED) -> dict[str, Work]:
    """Return the pieces of work by name.

    Args:
        indexed: how many sessions an index holds.
    """
    listed = (
        Work("device", "device by id", _device_calls, _check_device),
        Work("find_key", "idempotency find", _find_calls, _check_find),
        Work("agent_sessions", "50 sessions of an agent", _session_calls, _check_sessions),
        Work("seen", "last-seen write", _seen_calls, _check_seen, scarce=True),
        Work("consume", "nonce consume", _nonce_calls, _check_nonce, growth=("nonces", 1)),
        Work(
            "insert_key",
            "idempotency insert",
            _key_calls,
            lambda process, rows: _check_written_key(process, rows, "insert_key"),
            growth=("idempotency_keys", 1),
        ),
        Work(
            "claim",
            "claim and complete",
            _key_calls,
            lambda process, rows: _check_written_key(process, rows, "claim"),
            growth=("idempotency_keys", 1),
        ),
        Work(
            "index",
            f"index of {indexed:,} sessions",
            _index_calls(indexed),
            _check_index,
            growth=("sessions", indexed),
            once=True,
        ),
    )
    return {work.name: work for work in listed}
