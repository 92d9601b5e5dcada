"""Effects run once: for every caller, any number of calls, and any end of a call."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from homeagent import AgentCreate, Attempt, Database, IdempotencyKey, IdempotencyScope, Outcome, errors
from homeagent.stores import IdempotencyKeyStore
from tests.conftest import Children, FakeClock, add_device

SCOPE = IdempotencyScope("lamp", "orders.create", "k-1")
MINUTE = timedelta(minutes=1)
BACKENDS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])

pytestmark = pytest.mark.anyio


class Odd(BaseException):
    """An exception that is neither an Exception nor raised by Python itself."""


def row_of(database: Database, scope: IdempotencyScope = SCOPE) -> IdempotencyKey | None:
    return database.idempotency_keys.find(scope)


def never(attempt: Attempt) -> Any:
    """Fail if the effect of a finished key runs."""
    raise AssertionError("the effect ran again")


async def anever(attempt: Attempt) -> Any:
    """Fail like `never`, as a coroutine."""
    raise AssertionError("the effect ran again")


def raising(error: BaseException) -> Callable[[Attempt], Any]:
    """Return an effect that raises an error."""

    def effect(attempt: Attempt) -> None:
        raise error

    return effect


def abandon(database: Database, clock: FakeClock | None = None) -> None:
    """Leave an attempt in progress, as a process that died in the effect does. With a clock, the lease expires."""
    with pytest.raises(Odd):
        database.run_once(SCOPE, raising(Odd()), lease=MINUTE)
    if clock is not None:
        clock.advance(MINUTE)


def test_threads(database: Database) -> None:
    """If 8 threads call the same 200 keys, each effect runs once, and all threads get its result in the end."""
    ran: Counter[str] = Counter()
    mutex = threading.Lock()
    start = threading.Barrier(8)

    def effect(attempt: Attempt) -> str:
        with mutex:
            ran[attempt.scope.key] += 1
        return attempt.scope.key

    def call(key: str) -> bool:
        while True:
            with suppress(errors.IdempotencyInProgressError):
                outcome = database.run_once(IdempotencyScope("lamp", "m", key), effect)
                assert outcome.value == key
                return outcome.replayed

    def client(_: int) -> Counter[bool]:
        start.wait()
        return Counter(call(f"k{number}") for number in range(200))

    with ThreadPoolExecutor(8) as pool:
        answers = sum(pool.map(client, range(8)), Counter[bool]())
    assert set(ran.values()) == {1}
    assert answers == {False: 200, True: 1400}


PROCESS = """
import sys
from homeagent import Database, IdempotencyScope
from homeagent.errors import IdempotencyInProgressError
with Database.open(sys.argv[1], durability="normal") as database:
    print("ready", flush=True)
    sys.stdin.readline()
    keys = list(range(int(sys.argv[2])))
    while keys:
        later = []
        for key in keys:
            try:
                outcome = database.run_once(IdempotencyScope("lamp", "m", f"k{key}"), lambda attempt: key)
            except IdempotencyInProgressError:
                later.append(key)
                continue
            assert outcome.value == key
            if not outcome.replayed:
                print(key)
        keys = later
"""


@pytest.mark.parametrize(("processes", "keys"), [(4, 50), pytest.param(8, 200, marks=pytest.mark.slow)])
def test_processes(target: str, children: Children, processes: int, keys: int) -> None:
    """If several processes call the same keys, each effect runs once."""
    out = children.together(PROCESS, [[target, keys]] * processes)
    assert sorted(int(line) for lines in out for line in lines.split()) == list(range(keys))


@BACKENDS
async def test_tasks(database: Database) -> None:
    """If 256 tasks of an event loop call a key, the effect runs once; other tasks get a result or an error."""
    ran = 0
    told = 0

    async def effect(attempt: Attempt) -> int:
        nonlocal ran
        ran += 1
        await anyio.lowlevel.checkpoint()
        return 7

    async def client() -> None:
        nonlocal told
        try:
            outcome = await database.arun_once(SCOPE, effect)
        except errors.IdempotencyInProgressError:
            told += 1
        else:
            assert outcome.value == 7
            told += outcome.replayed

    async with anyio.create_task_group() as group:
        for _ in range(256):
            group.start_soon(client)
    assert (ran, told) == (1, 255)


def test_duplicate_in_flight(database: Database, clock: FakeClock) -> None:
    """A duplicate call gets the remaining time of the lease; a call with other parameters is refused."""

    def effect(attempt: Attempt) -> str:
        clock.advance(seconds=20)
        with pytest.raises(errors.IdempotencyInProgressError) as refusal:
            database.run_once(SCOPE, never, params={"n": 1}, lease=MINUTE)
        assert refusal.value.retry_after == timedelta(seconds=40)
        with pytest.raises(errors.FingerprintMismatchError):
            database.run_once(SCOPE, never, params={"n": 2}, lease=MINUTE)
        return "done"

    assert database.run_once(SCOPE, effect, params={"n": 1}, lease=MINUTE) == Outcome("done", False, 1)
    with pytest.raises(errors.FingerprintMismatchError):
        database.run_once(SCOPE, never, params={"n": 2})
    assert database.run_once(SCOPE, never, params={"n": 1}) == Outcome("done", True, 1)


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_effect_changes_its_parameters(database: Database) -> None:
    """If an effect changes its nested parameters, the fingerprint still covers the original parameters."""
    params: Any = {"order": {"lines": [1]}}

    def effect(attempt: Attempt) -> None:
        params["order"]["lines"].append(2)

    database.run_once(SCOPE, effect, params=params)
    assert database.run_once(SCOPE, never, params={"order": {"lines": [1]}}).replayed
    with pytest.raises(errors.FingerprintMismatchError):
        database.run_once(SCOPE, never, params=params)


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_bad_arguments(database: Database) -> None:
    """If an argument is invalid, `run_once` raises before it claims a key."""
    for arguments in (
        {"on_abandoned": "retry"},
        {"params": {1: 2}},
        {"lease": timedelta(seconds=-1)},
        {"ttl": timedelta(0)},
    ):
        with pytest.raises(errors.InvalidArgumentError):
            database.run_once(SCOPE, never, **arguments)  # type: ignore[arg-type]
    assert row_of(database) is None


class Awaited:
    """A callable whose call gives an awaitable, without being a coroutine function."""

    async def __call__(self, attempt: Attempt) -> Any:
        """Return without an effect."""


def generator(attempt: Attempt) -> Iterator[int]:
    """Yield values that no caller reads, so the body does not run."""
    yield 1


async def agenerator(attempt: Attempt) -> AsyncIterator[int]:
    """Yield values that no caller reads, as an asynchronous generator."""
    yield 1


class Generated:
    """A callable whose call gives a generator."""

    def __call__(self, attempt: Attempt) -> Iterator[int]:
        """Yield values that no caller reads."""
        yield 1


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_effect_that_is_not_a_function(database: Database) -> None:
    """If an effect is not callable, needs awaiting or is a generator function, no call claims the key."""
    generators: list[Any] = [generator, agenerator, functools.partial(agenerator), Generated()]
    wrong: list[Any] = [anever, functools.partial(anever), 5, None, *generators]
    for effect in wrong:
        words = "effect is a generator function" if effect in generators else "effect"
        with pytest.raises(errors.InvalidArgumentError, match=words):
            database.run_once(SCOPE, effect)
        with pytest.raises(errors.InvalidArgumentError, match=words), database.unit_of_work() as unit:
            unit.run_once(SCOPE, effect)
        if effect in (5, *generators):
            with pytest.raises(errors.InvalidArgumentError, match=words):
                anyio.run(functools.partial(database.arun_once, SCOPE, effect))
    with pytest.raises(errors.InvalidArgumentError, match="arun_once"):
        database.run_once(SCOPE, never, on_abandoned=anever)
    assert row_of(database) is None


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_effect_that_returns_a_coroutine(database: Database, clock: FakeClock) -> None:
    """If an effect returns an unawaited coroutine, the coroutine is never recorded as the result."""
    effects: dict[str, Any] = {"object": Awaited(), "lambda": lambda attempt: anever(attempt)}
    for name, effect in effects.items():
        scope = IdempotencyScope("lamp", "m", name)
        with pytest.raises(errors.InvalidArgumentError, match="coroutine"), database.unit_of_work() as unit:
            unit.run_once(scope, effect)
        assert row_of(database, scope) is None
        with pytest.raises(errors.InvalidArgumentError, match="arun_once"):
            database.run_once(scope, effect)
        clock.advance(minutes=2)
        with pytest.raises(errors.OutcomeUnknownError):
            database.run_once(scope, never)


@pytest.mark.parametrize("engine_name", ["sqlite"])
@pytest.mark.parametrize("kind", ["generator", "asynchronous generator", "awaitable"])
def test_effect_that_returns_deferred_work(database: Database, clock: FakeClock, kind: str) -> None:
    """If an effect returns a generator or an awaitable object, the effect is never recorded as completed."""

    class Later:
        def __await__(self) -> Iterator[None]:
            yield

    effects: dict[str, Callable[[Attempt], Any]] = {
        "generator": lambda attempt: generator(attempt),
        "asynchronous generator": lambda attempt: agenerator(attempt),
        "awaitable": lambda attempt: Later(),
    }
    effect = effects[kind]

    async def aeffect(attempt: Attempt) -> Any:
        return effect(attempt)

    with pytest.raises(errors.InvalidArgumentError, match="returned a"), database.unit_of_work() as unit:
        unit.run_once(SCOPE, effect)
    assert row_of(database) is None
    calls: dict[str, Callable[[IdempotencyScope], Any]] = {
        "run_once": lambda scope: database.run_once(scope, effect),
        "arun_once": lambda scope: anyio.run(functools.partial(database.arun_once, scope, aeffect)),
    }
    for name, call in calls.items():
        scope = IdempotencyScope("lamp", "m", name)
        with pytest.raises(errors.InvalidArgumentError, match="returned a"):
            call(scope)
        clock.advance(minutes=2)
        with pytest.raises(errors.OutcomeUnknownError):
            database.run_once(scope, never)


def test_replay(database: Database) -> None:
    """False and unusual results are replayed with the same value, type and sign."""
    values: list[Any] = [0, "", [], {}, False, None, -0.0, 2**70, "\x00\U0001f600"]
    for number, value in enumerate(values):
        scope = IdempotencyScope("lamp", "m", str(number))
        first = database.run_once(scope, functools.partial(lambda value, attempt: value, value))
        second = database.run_once(scope, never)
        assert (first.replayed, second.replayed, second.omitted) == (False, True, False)
        assert second.value == value
        assert type(second.value) is type(value)
        if isinstance(value, float):
            assert math.copysign(1, second.value) == -1  # type: ignore[arg-type]  # a JSON value, here a float


def test_result_that_cannot_be_stored(database: Database) -> None:
    """If a result is too large or not JSON, the record omits the result, and the effect does not run again."""
    values: list[Any] = ["x" * 1_100_000, {1, 2}, object(), float("nan")]
    for number, value in enumerate(values):
        scope = IdempotencyScope("lamp", "m", str(number))
        first = database.run_once(scope, functools.partial(lambda value, attempt: value, value))
        assert first.value is value
        assert (first.omitted, first.replayed) == (True, False)
        assert database.run_once(scope, never) == Outcome(None, True, 1, omitted=True)


def test_permanent_failure(database: Database) -> None:
    """If the effect raises EffectFailedError, its caller and every later caller get the error."""
    with pytest.raises(errors.EffectFailedError) as first:
        database.run_once(SCOPE, raising(errors.EffectFailedError({"reason": "no stock"})))
    with pytest.raises(errors.EffectFailedError) as second:
        database.run_once(SCOPE, never)
    assert (first.value.replayed, second.value.replayed) == (False, True)
    assert first.value.detail == second.value.detail == {"reason": "no stock"}


def test_any_other_exception(database: Database, clock: FakeClock) -> None:
    """If the effect raises another exception, the caller gets it unchanged, and the effect never runs again."""
    for number, error in enumerate([RuntimeError("x"), KeyboardInterrupt(), SystemExit(3), Odd()]):
        scope = IdempotencyScope("lamp", "m", str(number))
        with pytest.raises(type(error)) as raised:
            database.run_once(scope, raising(error), lease=MINUTE)
        assert raised.value is error
        with pytest.raises(errors.IdempotencyInProgressError):
            database.run_once(scope, never)
        clock.advance(MINUTE)
        with pytest.raises(errors.OutcomeUnknownError):
            database.run_once(scope, never)
    clock.advance(days=400)
    database.sweep()
    with pytest.raises(errors.OutcomeUnknownError) as refusal:
        database.run_once(scope, never)
    assert refusal.value.attempt == 1


@pytest.mark.parametrize("engine_name", ["sqlite"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_exceptions_of_coroutines(database: Database, backend: str) -> None:
    """`arun_once` raises an exception without a group around it, with the same effect on the key as `run_once`."""
    for error, expected in (
        (RuntimeError("x"), "in_progress"),
        (errors.EffectFailedError(1), "failed"),
        (errors.EffectNotStartedError(), None),
        (SystemExit(3), "in_progress"),
        (Odd(), "in_progress"),
    ):
        scope = IdempotencyScope("lamp", "m", repr(error))

        async def effect(attempt: Attempt, error: BaseException = error) -> None:
            raise error

        async def main(scope: IdempotencyScope = scope, effect: Any = effect) -> BaseException | None:
            try:
                await database.arun_once(scope, effect)
            except BaseException as raised:  # noqa: BLE001  it is compared
                return raised
            return None

        assert anyio.run(main, backend=backend) is error
        row = row_of(database, scope)
        assert (None if row is None else str(row.state)) == expected


@BACKENDS
async def test_coroutine_that_lost_its_key(database: Database) -> None:
    """If another attempt took the key over, the coroutine raises an unwrapped LeaseLostError, however it ended."""

    async def effect(attempt: Attempt, error: Exception | None = None) -> int:
        database.run(lambda unit: unit.idempotency_keys.release(attempt))
        if error is not None:
            raise error
        return 1

    for error in (None, errors.EffectFailedError(1), errors.EffectNotStartedError()):
        with pytest.raises(errors.LeaseLostError):
            await database.arun_once(SCOPE, functools.partial(effect, error=error))


def test_rerun(database: Database, clock: FakeClock) -> None:
    """With `rerun` a second attempt begins, and passes the same key to downstream services."""
    keys: list[str] = []

    def dies(attempt: Attempt) -> None:
        keys.append(attempt.downstream_key)
        raise Odd

    for _ in range(2):
        with pytest.raises(Odd):
            database.run_once(SCOPE, dies, lease=MINUTE, on_abandoned="rerun")
        clock.advance(MINUTE)
    outcome = database.run_once(SCOPE, lambda attempt: attempt.downstream_key, on_abandoned="rerun")
    assert (outcome.attempt, keys) == (3, [outcome.value] * 2)
    other = database.run_once(IdempotencyScope("lamp", "m", "k-2"), lambda attempt: attempt.downstream_key)
    assert other.value != outcome.value


def test_on_abandoned_function_decides_the_outcome(database: Database, clock: FakeClock) -> None:
    """If `on_abandoned` is a function, it decides about the attempt, and its return value is the outcome."""

    def find_out(attempt: Attempt) -> Any:
        return {"found": attempt.number}

    assert database.run_once(IdempotencyScope("a", "b", "c"), lambda attempt: 1, on_abandoned=find_out).value == 1
    abandon(database)
    with pytest.raises(errors.IdempotencyInProgressError):
        database.run_once(SCOPE, never, on_abandoned=find_out)
    clock.advance(MINUTE)
    assert database.run_once(SCOPE, never, on_abandoned=find_out) == Outcome({"found": 2}, False, 2)
    assert database.run_once(SCOPE, never) == Outcome({"found": 2}, True, 2)


def test_on_abandoned_function_without_an_outcome(database: Database, clock: FakeClock) -> None:
    """The function frees the key if the effect did not happen, and leaves the outcome unknown if it can't decide."""
    abandon(database, clock)
    with pytest.raises(ConnectionError):
        database.run_once(SCOPE, never, on_abandoned=raising(ConnectionError()), lease=MINUTE)
    clock.advance(MINUTE)
    with pytest.raises(errors.OutcomeUnknownError):
        database.run_once(SCOPE, never)
    with pytest.raises(errors.EffectNotStartedError):
        database.run_once(SCOPE, never, on_abandoned=raising(errors.EffectNotStartedError()))
    assert row_of(database) is None


def test_rerun_that_did_not_start(database: Database, clock: FakeClock) -> None:
    """If a second attempt did not start, the outcome of the first attempt stays unknown."""
    abandon(database, clock)
    with pytest.raises(errors.EffectNotStartedError):
        database.run_once(SCOPE, raising(errors.EffectNotStartedError()), on_abandoned="rerun")
    with pytest.raises(errors.OutcomeUnknownError):
        database.run_once(SCOPE, never)


@pytest.mark.parametrize("engine_name", ["sqlite"])
@BACKENDS
async def test_on_abandoned_coroutine_decides_the_outcome(database: Database, clock: FakeClock) -> None:
    """`on_abandoned` may be a coroutine function."""

    async def find_out(attempt: Attempt) -> Any:
        await anyio.lowlevel.checkpoint()
        return attempt.number

    abandon(database, clock)
    assert await database.arun_once(SCOPE, anever, on_abandoned=find_out) == Outcome(2, False, 2)


def test_recreated_device(database: Database) -> None:
    """If a device is recreated, it gets no result of the old device, and the old attempt records no result."""
    add_device(database)
    database.run_once(SCOPE, lambda attempt: "secret of the old device")

    def effect(attempt: Attempt) -> str:
        database.devices.delete("lamp")
        add_device(database)
        assert not database.run_once(SCOPE, lambda attempt: "new").replayed
        assert not database.run_once(other, lambda attempt: "new").replayed
        return "old"

    other = IdempotencyScope("lamp", "orders.create", "k-2")
    with pytest.raises(errors.LeaseLostError):
        database.run_once(other, effect)
    assert database.run_once(other, never).value == "new"


async def turns() -> None:
    """Let every other task run several times, so that a cancellation is delivered."""
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await anyio.lowlevel.checkpoint()


def hold(database: Database) -> list[Any]:
    """Take all connections for writes."""
    writers = database._engine.writers
    return [writers.acquire(30) for _ in range(writers._size)]


def give_back(database: Database, held: list[Any]) -> None:
    for connection in held:
        database._engine.writers.release(connection)


class Native:
    """Cancel by `Task.cancel`, as asyncio itself does."""

    backend = "asyncio"

    @staticmethod
    async def cancel(
        work: Callable[[], Awaitable[Any]], when: Callable[[], Awaitable[Any]], then: Callable[[], object] = int
    ) -> bool:
        """Start `work`, cancel it after `when` returned, call `then`, and return whether `work` was cancelled."""
        task = asyncio.ensure_future(work())
        await when()
        task.cancel()
        await turns()
        then()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        return task.cancelled()


class Scoped:
    """Cancel by a scope, as AnyIO and Trio do."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    @staticmethod
    async def cancel(
        work: Callable[[], Awaitable[Any]], when: Callable[[], Awaitable[Any]], then: Callable[[], object] = int
    ) -> bool:
        """Start `work`, cancel it after `when` returned, call `then`, and return whether `work` was cancelled."""
        ended = False

        async def child() -> None:
            nonlocal ended
            try:
                await work()
            except anyio.get_cancelled_exc_class():
                ended = True
                raise
            except errors.HomeAgentError:
                pass  # the effect's error, which the test finds in the store

        async with anyio.create_task_group() as group:
            group.start_soon(child)
            await when()
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await turns()
            then()
        return ended


CANCELLERS = pytest.mark.parametrize(
    "canceller", [Native(), Scoped("asyncio"), Scoped("trio")], ids=["Task.cancel", "asyncio scope", "trio scope"]
)


@CANCELLERS
def test_cancelled_effect(database: Database, canceller: Native | Scoped) -> None:
    """If the caller is cancelled, the effect is cancelled too, and the known outcome is recorded."""
    ends: list[str] = []

    async def main() -> None:
        for key, end in (("a", "raise"), ("b", "return"), ("c", "fail"), ("d", "free")):
            began = anyio.Event()

            async def effect(attempt: Attempt, began: anyio.Event = began, end: str = end) -> Any:
                began.set()
                try:
                    await anyio.sleep_forever()
                except anyio.get_cancelled_exc_class():
                    ends.append(end)
                    if end == "return":
                        return "undone"
                    if end == "fail":
                        raise errors.EffectFailedError("cancelled") from None
                    if end == "free":
                        raise errors.EffectNotStartedError from None
                    raise

            scope = IdempotencyScope("lamp", "m", key)
            await canceller.cancel(functools.partial(database.arun_once, scope, effect), began.wait)

    anyio.run(main, backend=canceller.backend)
    assert ends == ["raise", "return", "fail", "free"]
    rows = [row_of(database, IdempotencyScope("lamp", "m", key)) for key in "abcd"]
    assert [row and str(row.state) for row in rows] == ["in_progress", "completed", "failed", None]


@CANCELLERS
def test_cancelled_record(database: Database, canceller: Native | Scoped, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the caller is cancelled while the outcome is being recorded, the record is stored before the caller ends."""
    recording = threading.Event()
    go_on = threading.Event()
    complete = IdempotencyKeyStore.complete

    def held(store: IdempotencyKeyStore, attempt: Attempt, result: Any) -> Any:
        recording.set()
        assert go_on.wait(30)
        return complete(store, attempt, result)

    monkeypatch.setattr(IdempotencyKeyStore, "complete", held)

    async def effect(attempt: Attempt) -> str:
        return "done"

    async def main() -> None:
        async def when() -> None:
            assert await anyio.to_thread.run_sync(recording.wait, 30)

        await canceller.cancel(lambda: database.arun_once(SCOPE, effect), when, go_on.set)
        row = row_of(database)
        assert row is not None
        assert row.result == "done"

    anyio.run(main, backend=canceller.backend)


@CANCELLERS
def test_cancelled_before_the_records_turn(database: Database, canceller: Native | Scoped) -> None:
    """If the caller is cancelled while the outcome waits for the write lock, the record is still stored first."""
    writers = database._engine.writers
    group_commit = database._runner._group_commit
    leading = threading.Thread(target=database.run, args=(lambda unit: None,))
    held: list[Any] = []

    def waiting() -> int:
        return len(writers._waiters) + (group_commit._queue.qsize() if group_commit is not None else 0)

    async def effect(attempt: Attempt) -> str:
        held.extend(hold(database))
        # Other callers came before: the record is behind them in the queue.
        leading.start()
        await until(waiting)
        return "done"

    async def main() -> None:
        call = functools.partial(database.arun_once, SCOPE, effect)
        await canceller.cancel(
            call, functools.partial(until, lambda: waiting() >= 2), lambda: give_back(database, held)
        )
        row = row_of(database)
        assert row is not None
        assert row.result == "done"

    anyio.run(main, backend=canceller.backend)
    leading.join(30)


@CANCELLERS
def test_cancelled_claim(database: Database, canceller: Native | Scoped) -> None:
    """If the caller is cancelled before the effect began, the key is free."""

    async def main() -> None:
        held = hold(database)
        call = functools.partial(database.arun_once, SCOPE, anever)
        waits = functools.partial(until, lambda: database._engine.writers.waiting)
        assert await canceller.cancel(call, waits, lambda: give_back(database, held))

    anyio.run(main, backend=canceller.backend)
    assert row_of(database) is None


@CANCELLERS
def test_cancelled_unit(database: Database, canceller: Native | Scoped) -> None:
    """If `arun` is cancelled, it ends its unit before it returns: the next writer gets the write lock at once."""
    began = threading.Event()
    go_on = threading.Event()
    ended: list[bool] = []

    def work(unit: Any) -> None:
        began.set()
        assert go_on.wait(30)
        unit.after_commit(lambda: ended.append(True))
        unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv"))

    async def main() -> None:
        async def when() -> None:
            assert await anyio.to_thread.run_sync(began.wait, 30)

        await canceller.cancel(lambda: database.arun(work), when, go_on.set)
        assert ended == [True]

    anyio.run(main, backend=canceller.backend)
    waits = database.counters().pool_waits
    with database.unit_of_work() as unit:
        assert unit.agents.get("ada").name == "Ada"
    assert database.counters().pool_waits == waits


@pytest.mark.parametrize("read_only", [False, True])
def test_a_unit_ends_before_its_event_loop(database: Database, read_only: bool) -> None:
    """If asyncio.run() cancels the remaining tasks at its end, a running unit ends before its caller does."""
    began, go_on = threading.Event(), threading.Event()
    ends: list[str] = []

    def work(unit: Any) -> None:
        began.set()
        assert go_on.wait(30)
        ends.append("unit")

    async def caller() -> None:
        try:
            await database.arun(work, read_only=read_only)
        except asyncio.CancelledError:
            ends.append("caller")
            raise

    async def main() -> asyncio.Task[None]:
        left = asyncio.ensure_future(caller())
        assert await anyio.to_thread.run_sync(began.wait, 30)
        loop = asyncio.get_running_loop()

        def go_on_after(turns: int) -> None:
            # By then all tasks were cancelled, and each task has run.
            if turns:
                loop.call_soon(go_on_after, turns - 1)
            else:
                go_on.set()

        go_on_after(50)
        return left

    assert asyncio.run(main()).cancelled()
    assert ends == ["unit", "caller"]


@BACKENDS
async def test_arun_raises_exceptions_of_the_work(database: Database) -> None:
    """If the work raises, the coroutine gets the exception unchanged, and the unit was rolled back."""
    error = LookupError("x")

    def work(unit: Any) -> None:
        unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv"))
        raise error

    with pytest.raises(LookupError) as raised:
        await database.arun(work)
    assert raised.value is error
    assert await database.arun(lambda unit: unit.agents.list(), read_only=True) == []


def test_one_commit(database: Database) -> None:
    """Key, effect and result are a single commit, and neither the effect nor its callback runs again."""
    told: list[str] = []

    def effect(attempt: Attempt) -> Any:
        unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv"))
        unit.after_commit(lambda: told.append("durable"))
        return {"made": "ada"}

    with database.unit_of_work() as unit:
        assert unit.run_once(SCOPE, effect, params=1) == Outcome({"made": "ada"}, False, 1)
        assert not told
    assert told == ["durable"]
    with database.unit_of_work() as unit:
        assert unit.run_once(SCOPE, never, params=1).replayed
        with pytest.raises(errors.FingerprintMismatchError):
            unit.run_once(SCOPE, never, params=2)
    assert told == ["durable"]


def test_all_undone(database: Database) -> None:
    """If the unit is rolled back, key, effect and callbacks of the effect are all discarded."""

    def effect(attempt: Attempt) -> None:
        unit.after_commit(lambda: pytest.fail("it was rolled back"))
        unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv"))

    with suppress(Odd), database.unit_of_work() as unit:
        unit.run_once(SCOPE, effect)
        raise Odd
    with database.unit_of_work() as unit:
        assert unit.agents.find_by_id("ada") is None
        assert unit.idempotency_keys.find(SCOPE) is None


@pytest.mark.parametrize(
    "error", [errors.EffectNotStartedError(), RuntimeError(), errors.EffectFailedError("no")], ids=repr
)
def test_effect_undone_alone(database: Database, error: Exception) -> None:
    """If an effect raises, its writes are undone and the unit continues; only EffectFailedError leaves a record."""

    def effect(attempt: Attempt) -> None:
        unit.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv"))
        raise error

    with database.unit_of_work() as unit:
        unit.agents.create(AgentCreate(id="bob", name="Bob", workspace_path="/srv"))
        with pytest.raises(type(error)) as raised:
            unit.run_once(SCOPE, effect)
        assert raised.value is error
    with database.unit_of_work() as unit:
        assert [agent.id for agent in unit.agents.list()] == ["bob"]
        if not isinstance(error, errors.EffectFailedError):
            assert unit.run_once(SCOPE, lambda attempt: 1).attempt == 1
            return
        with pytest.raises(errors.EffectFailedError) as replay:
            unit.run_once(SCOPE, never)
        assert (replay.value.detail, replay.value.replayed) == ("no", True)


def test_unknown_outcome_in_a_unit(database: Database, clock: FakeClock) -> None:
    """If a key's outcome is unknown or in progress, `run_once` inside a unit refuses the key too."""
    abandon(database)
    with database.unit_of_work() as unit:
        with pytest.raises(errors.IdempotencyInProgressError):
            unit.run_once(SCOPE, never)
        clock.advance(MINUTE)
        with pytest.raises(errors.OutcomeUnknownError):
            unit.run_once(SCOPE, never)


def test_nested_call_with_the_same_key(database: Database) -> None:
    """If an effect calls `run_once` of its unit with the effect's own key, the call is in progress."""
    with database.unit_of_work() as unit:
        with pytest.raises(errors.IdempotencyInProgressError):
            unit.run_once(SCOPE, lambda attempt: unit.run_once(SCOPE, never).value)
        assert unit.run_once(SCOPE, lambda attempt: 1).attempt == 1
