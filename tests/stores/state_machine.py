"""Compare stores with plain models, for random sequences of calls, changes by the ORM and movements of the clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from sqlalchemy import text

from homeagent import Database, Limits
from homeagent.errors import HomeAgentError
from homeagent.stores.nonces import NONCE_GRACE
from tests.conftest import START, FakeClock, RecordProperty

__all__ = ["LIMITS", "MINUTE", "MS", "NAMES", "SHARES", "Machine", "action", "names", "run_sequences", "run_share"]

MS = timedelta(milliseconds=1)
MINUTE = timedelta(minutes=1)
LIMITS = Limits(
    pending_devices=1,
    pending_ttl=MINUTE,
    nonces_per_device=2,
    keys_per_device=2,
    longest_ttl=2 * MINUTE,
    changes_kept=MINUTE,
)

NAMES = ("a", "b/c", "c", "A")
F = TypeVar("F", bound=Callable[..., None])

names = st.sampled_from(NAMES)
moves = st.sampled_from([MS, MINUTE - MS, MINUTE, NONCE_GRACE, -MS, -MINUTE])


def action(
    is_possible: Callable[[Any], bool] = lambda machine: True, **strategies: st.SearchStrategy[Any]
) -> Callable[[F], F]:
    """Mark a method as an action, with the strategies of its arguments. An argument `data` draws further values."""

    def mark(method: F) -> F:
        method.action = (is_possible, strategies)  # type: ignore[attr-defined]  # a function has any attribute
        return method

    return mark


class Machine(RuleBasedStateMachine):
    """Run each step on a database and on a model, and compare the answers.

    The attributes `database`, `clock`, `loop` and `counts` belong to the class, because all sequences use the same
    database.
    """

    database: Database
    clock: FakeClock
    loop: asyncio.AbstractEventLoop
    counts: dict[str, int]
    actions: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        members = {name: member for kind in reversed(cls.__mro__) for name, member in vars(kind).items()}
        cls.actions = {name: member.action for name, member in members.items() if hasattr(member, "action")}

    # Hypothesis disables some rules in each sequence, so that few sequences would have calls that depend on each other.
    # Therefore there is one rule, in which each action has the same chance.
    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        possible = [name for name, (is_possible, _) in self.actions.items() if is_possible(self)]
        name = data.draw(st.sampled_from(possible), label="action")
        strategies = self.actions[name][1]
        getattr(self, name)(
            **{key: data if key == "data" else data.draw(each, label=key) for key, each in strategies.items()}
        )

    def start_empty(self) -> None:
        """Delete the rows of the sequence before, and set the clock back to its first time."""
        self.clock.now = START
        self.calls = 0
        self.counts["sequences"] += 1
        with self.database.unit_of_work() as unit:
            for table in ("idempotency_keys", "nonces", "sessions", "agents", "devices"):
                unit.session.connection().execute(text(f"DELETE FROM {table}"))

    def attempt(self, store: str, method: str, *arguments: Any, **options: Any) -> Any:
        """Return the result of a method, or the class of the error that the method raised.

        Every second call is a unit with one call, and the others are calls of the database's own store.
        """
        self.calls += 1
        try:
            if self.calls % 2:
                return getattr(getattr(self.database, store), method)(*arguments, **options)
            with self.database.unit_of_work() as unit:
                return getattr(getattr(unit, store), method)(*arguments, **options)
        except HomeAgentError as error:
            return type(error)

    @action(by=moves)
    def move_clock(self, by: timedelta) -> None:
        self.clock.advance(by)

    def check_invariants(self, *arguments: Any, **options: Any) -> None:
        """Count the steps: Hypothesis calls this method before the first step and after each step."""
        self.counts["steps"] += 1
        super().check_invariants(*arguments, **options)


def run_sequences(kind: type[Machine], target: str, sequences: int, steps: int, **options: Any) -> dict[str, int]:
    """Run at most this many sequences, with at most this many steps, on a database. Return the numbers of both."""
    clock, loop, counts = FakeClock(), asyncio.new_event_loop(), {"sequences": 0, "steps": 0}
    try:
        with Database.open(target, clock=clock, durability="normal", limits=LIMITS) as database:
            machine = type(
                kind.__name__, (kind,), {"database": database, "clock": clock, "loop": loop, "counts": counts}
            )
            # Hypothesis can take five minutes to shorten a failing sequence, and `faulthandler_timeout` then ends the
            # run without a report. For a shorter sequence add `Phase.shrink`, which begins with the stored failure.
            phases = (Phase.explicit, Phase.reuse, Phase.generate)
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=sequences, stateful_step_count=steps, deadline=None, phases=phases, **options
                ),
            )
    finally:
        loop.close()
    return counts


SHARES = range(8)
"""Parts of a campaign. A single test would take longer than pytest allows (`faulthandler_timeout`)."""


def run_share(kind: type[Machine], target: str, record_property: RecordProperty) -> None:
    """Run an eighth of a campaign of 2,000 sequences on SQLite and 320 on PostgreSQL, with new random sequences."""
    # In a hosted workflow, the default profile of Hypothesis would give each share the same sequences.
    counts = run_sequences(kind, target, 40 if "://" in target else 250, 25, derandomize=False)
    for name, count in counts.items():
        record_property(f"random {name} of store calls, compared with a model", count)
