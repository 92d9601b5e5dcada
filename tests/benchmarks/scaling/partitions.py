"""The nonces of a day at a smaller scale: one table, as the schema has it, against ways to part it.

Each way gets the same rows through the same upsert, many in one transaction, so that the tables are measured and not
the wait for the disk. Then the first hour has expired and goes: deleted in batches, or dropped with its partition. At
last a message comes again, and a nonce comes again in another message: what is let in tells what is still guarded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from tests.benchmarks.scaling.stores import Place, open_place

__all__ = ["SCHEMES", "measure_outgrown", "measure_partitions"]

DEVICES = 10_000
HOURS = 24
INSERTED_TOGETHER = 500
DELETED_TOGETHER = 100  # as Database.sweep does
OUTGROWN_MIB = 16

_HOUR = 3600 * 1000
_START = 1_767_225_600_000
_SKEW = 300_000

_TABLE = """
    CREATE TABLE nonces (
        nonce text COLLATE "C" NOT NULL,
        device_id text COLLATE "C" NOT NULL,
        created_at bigint NOT NULL,
        expires_at bigint NOT NULL,
        PRIMARY KEY ({key})
    ) {by}
"""

# What NonceStore.consume and delete_expired run. The text of the first differs by the key alone.
_CONSUME = """
    INSERT INTO nonces (nonce, device_id, created_at, expires_at)
    VALUES (%(nonce)s, %(device)s, %(now)s, %(expires_at)s)
    ON CONFLICT ({key}) DO UPDATE SET created_at = excluded.created_at, expires_at = excluded.expires_at
    WHERE nonces.expires_at <= %(now)s
"""
_DELETE = """
    DELETE FROM nonces WHERE (device_id, nonce) IN (
        SELECT device_id, nonce FROM nonces WHERE expires_at <= %s ORDER BY expires_at LIMIT %s
        FOR UPDATE SKIP LOCKED
    )
"""


@dataclass(frozen=True)
class Scheme:
    """One way to keep nonces.

    Attributes:
        title: what it is called in the report.
        key: the primary key; it must hold every column that the table is parted by.
        by: how the table is parted.
        parts: the statements that make its parts.
        first_hour: the parts that hold the first hour alone. Where there are none, rows are deleted.
    """

    title: str
    key: str
    by: str = ""
    parts: tuple[str, ...] = ()
    first_hour: tuple[str, ...] = ()


def _hours(of: str) -> Iterator[str]:
    for hour in range(HOURS):
        bounds = f"FROM ({_START + hour * _HOUR}) TO ({_START + (hour + 1) * _HOUR})"
        yield f"CREATE TABLE {of}_h{hour} PARTITION OF {of} FOR VALUES {bounds}"


def _hashes(parts: int, *, by_hour: bool = False) -> Iterator[str]:
    for part in range(parts):
        values = f"WITH (MODULUS {parts}, REMAINDER {part})"
        below = "PARTITION BY RANGE (expires_at)" if by_hour else ""
        yield f"CREATE TABLE nonces_p{part} PARTITION OF nonces FOR VALUES {values} {below}"
        if by_hour:
            yield from _hours(f"nonces_p{part}")


_BY_TIME = "device_id, nonce, expires_at"
_BY_DEVICE = "PARTITION BY HASH (device_id)"

SCHEMES = (
    Scheme("one table", "device_id, nonce"),
    Scheme("16 parts by hash of the device", "device_id, nonce", _BY_DEVICE, tuple(_hashes(16))),
    Scheme("24 parts by time", _BY_TIME, "PARTITION BY RANGE (expires_at)", tuple(_hours("nonces")), ("nonces_h0",)),
    Scheme(
        "4 parts by hash, each in 24 by time",
        _BY_TIME,
        _BY_DEVICE,
        tuple(_hashes(4, by_hour=True)),
        tuple(f"nonces_p{part}_h0" for part in range(4)),
    ),
)


def measure_partitions(place: Place, *, rows: int) -> dict[str, Any]:
    """Return, by scheme, its rates, sizes and costs, and what it let in a second time."""
    return {scheme.title: _measure(place, scheme, rows) for scheme in SCHEMES}


def measure_outgrown(place: Place, *, rows: int) -> dict[str, Any]:
    """Return the same, of a server whose memory the indexes outgrow as they would at a thousand times the size.

    It may keep few pages, and reads past the operating system's cache where it can: PostgreSQL has that from 16 on.
    """
    ((version,),) = place.server.execute("SHOW server_version_num")
    settings = {"shared_buffers": f"{OUTGROWN_MIB}MB", "max_wal_size": "4GB"}
    if int(version) >= 160_000:
        settings["debug_io_direct"] = "data"
    with open_place(place.server.installation.programs, settings) as small:
        return {scheme.title: {"mib": OUTGROWN_MIB, **_measure(small, scheme, rows)} for scheme in SCHEMES[:3]}


def _measure(place: Place, scheme: Scheme, rows: int) -> dict[str, Any]:
    import psycopg

    name = place.new_database()
    consume = _CONSUME.format(key=scheme.key)
    with psycopg.connect(place.server.url(name), autocommit=True) as connection:
        connection.execute(_TABLE.format(key=scheme.key, by=scheme.by).encode())
        for part in scheme.parts:
            connection.execute(part.encode())
        if not scheme.first_hour:
            connection.execute("CREATE INDEX idx_nonces_expires ON nonces (expires_at)")
        connection.execute("CHECKPOINT")
        begun = _log_position(connection)
        rates = _insert(connection, consume, rows)
        written = _log_position(connection) - begun
        sizes = {f"{kind}_bytes_per_row": round(size / rows, 1) for kind, size in _sizes(connection).items()}
        connection.execute("VACUUM ANALYZE nonces")
        result = {
            "rows": rows,
            "rows_per_second": rates,
            "wal_bytes_per_row": round(written / rows, 1),
            **sizes,
            "expiry": _expire(connection, scheme),
            **_come_again(connection, consume, rows),
        }
    place.server.execute(f"DROP DATABASE {name}")
    return result


def _expires_at(number: int, rows: int) -> int:
    """Return when the nonce of this number expires: over a day, evenly, in order."""
    return _START + number * HOURS * _HOUR // rows


def _values(device: str, nonce: str, expires_at: int) -> dict[str, Any]:
    return {"device": device, "nonce": nonce, "now": expires_at - _SKEW, "expires_at": expires_at}


def _insert(connection: Any, consume: str, rows: int) -> list[int]:
    """Insert all rows, and return how many a second it were in each tenth of them."""
    rates = []
    cursor = connection.cursor()
    for tenth in range(10):
        numbers = range(tenth * rows // 10, (tenth + 1) * rows // 10)
        start = time.perf_counter()
        for first in range(numbers.start, numbers.stop, INSERTED_TOGETHER):
            together = range(first, min(first + INSERTED_TOGETHER, numbers.stop))
            cursor.execute("BEGIN")
            cursor.executemany(
                consume,
                [_values(f"device-{n * 7919 % DEVICES}", uuid4().hex, _expires_at(n, rows)) for n in together],
            )
            cursor.execute("COMMIT")
        rates.append(round(len(numbers) / (time.perf_counter() - start)))
    return rates


def _log_position(connection: Any) -> int:
    return int(connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchone()[0])


def _sizes(connection: Any) -> dict[str, int]:
    tables = "FROM pg_class WHERE relname LIKE 'nonces%' AND relkind = 'r'"
    (rows,) = connection.execute(f"SELECT sum(pg_table_size(oid)) {tables}").fetchone()
    key, expiry = connection.execute(
        "SELECT sum(pg_relation_size(indexrelid)) FILTER (WHERE indisprimary),"
        " coalesce(sum(pg_relation_size(indexrelid)) FILTER (WHERE NOT indisprimary), 0)"
        f" FROM pg_index WHERE indrelid IN (SELECT oid {tables})"
    ).fetchone()
    return {"table": int(rows), "key": int(key), "expiry_index": int(expiry)}


def _expire(connection: Any, scheme: Scheme) -> dict[str, Any]:
    """Remove the first hour, and return how many rows that were, and what it took and gave back."""
    until = _START + _HOUR - 1
    (dead,) = connection.execute("SELECT count(*) FROM nonces WHERE expires_at <= %s", [until]).fetchone()
    before = sum(_sizes(connection).values())
    begun = _log_position(connection)
    longest = 0.0
    start = time.perf_counter()
    if scheme.first_hour:
        for part in scheme.first_hour:
            step = time.perf_counter()
            connection.execute(f"DROP TABLE {part}".encode())
            longest = max(longest, time.perf_counter() - step)
    else:
        removed = DELETED_TOGETHER
        while removed == DELETED_TOGETHER:
            step = time.perf_counter()
            removed = connection.execute(_DELETE, [until, DELETED_TOGETHER]).rowcount
            longest = max(longest, time.perf_counter() - step)
        # The server does this by itself sooner or later; until then the rows are still there.
        connection.execute("VACUUM nonces")
    return {
        "rows": dead,
        "seconds": round(time.perf_counter() - start, 3),
        "longest_transaction_seconds": round(longest, 4),
        "wal_bytes": _log_position(connection) - begun,
        "bytes_given_back": before - sum(_sizes(connection).values()),
    }


def _come_again(connection: Any, consume: str, rows: int) -> dict[str, Any]:
    """Return whether a message is let in a second time, and whether its nonce is in a message signed an hour later."""
    expires_at = _expires_at(rows // 2, rows)
    first = _values("device-1", "comes-again", expires_at)
    assert connection.execute(consume, first).rowcount == 1
    same = connection.execute(consume, first).rowcount
    other = connection.execute(consume, {**first, "expires_at": expires_at + _HOUR}).rowcount
    return {"same_message_let_in": bool(same), "same_nonce_in_another_message_let_in": bool(other)}
