"""The figures as Markdown, a table for each section, and their places in a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tests.benchmarks.machine import is_busy, told_load

__all__ = ["TABLES", "replace_tables", "tell"]

_NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _operations(found: dict[str, Any]) -> str:
    head = ["µs, median (p99)"]
    (first, *_) = found.values()
    stores = [(engine, size) for engine in first for size in first[engine]]
    head += [f"{_NAMES[engine]}, {int(size):,} rows" for engine, size in stores]
    rows = []
    for name, by_engine in found.items():
        figures = [by_engine[engine][size] for engine, size in stores]
        rows.append([name, *(f"{figure['median']:,.0f} ({figure['p99']:,.0f})" for figure in figures)])
    return _table(head, rows)


def _writers(found: dict[str, Any]) -> str:
    head = ["processes"]
    for engine in found:
        head += [f"{_NAMES[engine]}: commits/s", "p99 ms", "longest ms"]
    (first, *_) = found.values()
    rows = []
    for number in first:
        row = [number]
        for by_number in found.values():
            figure = by_number[number]
            row += [f"{figure['commits_per_second']:,.0f}", f"{figure['p99_ms']:,.1f}", f"{figure['max_ms']:,.0f}"]
        rows.append(row)
    return _table(head, rows)


def _host(found: dict[str, Any]) -> str:
    per_row = found["disk_bytes_per_row"]
    return _table(
        ["a host", "cost"],
        [
            ["connections, its pool being full", found["connections"]],
            ["server memory for each, private to it", _mib(found["server_bytes_per_connection"])],
            ["memory of the host's process", _mib(found["client_resident_bytes"])],
            ["write-ahead log for a million messages", f"{found['wal_bytes_per_message'] / 1000:,.2f} GB"],
            ["disk for a million nonces, with indexes", f"{per_row['nonces']:,.0f} MB"],
            ["disk for a million keys, with indexes", f"{per_row['idempotency_keys']:,.0f} MB"],
            ["a SQLite file for a million messages", f"{found['sqlite_file_bytes_per_message']:,.0f} MB"],
        ],
    )


def _copies(found: dict[str, Any]) -> str:
    rows = []
    for direction, by_size in found.items():
        for figure in by_size.values():
            rate = figure["rows"] / figure["seconds"]
            rows.append(
                [
                    direction,
                    f"{figure['rows']:,}",
                    f"{figure['seconds']:,.1f}",
                    f"{rate:,.0f}",
                    _mib(figure["peak_bytes"]),
                ]
            )
    return _table(["direction", "rows", "seconds", "rows/s", "peak memory"], rows)


def _partitions(found: dict[str, Any]) -> str:
    (first, *_) = found.values()
    head = [f"{first['rows']:,} rows", *found]

    def row(title: str, figure: Callable[[dict[str, Any]], object]) -> list[object]:
        return [title, *map(figure, found.values())]

    rows = [
        row("rows inserted/s, first tenth", lambda f: f"{f['rows_per_second'][0]:,}"),
        row("rows inserted/s, last tenth", lambda f: f"{f['rows_per_second'][-1]:,}"),
        row("WAL bytes/row", lambda f: f"{f['wal_bytes_per_row']:,.0f}"),
        row("table bytes/row", lambda f: f"{f['table_bytes_per_row']:,.0f}"),
        row("key index bytes/row", lambda f: f"{f['key_bytes_per_row']:,.0f}"),
        row("expiry index bytes/row", lambda f: f"{f['expiry_index_bytes_per_row']:,.0f}"),
        row("an hour expires: rows", lambda f: f"{f['expiry']['rows']:,}"),
        row("… seconds to remove them", lambda f: f"{f['expiry']['seconds']:,.3f}"),
        row("… WAL", lambda f: _mib(f["expiry"]["wal_bytes"])),
        row("… disk given back", lambda f: _mib(f["expiry"]["bytes_given_back"])),
        row("the same message again", lambda f: _verdict(f["same_message_let_in"])),
        row("its nonce in another message", lambda f: _verdict(f["same_nonce_in_another_message_let_in"])),
    ]
    return _table(head, rows)


def _outgrown(found: dict[str, Any]) -> str:
    (first, *_) = found.values()
    shares = [first["rows"] * (tenth + 1) // 10 for tenth in range(10)]
    rows: list[list[object]] = [
        [f"rows inserted/s, up to {share:,}", *(f"{figure['rows_per_second'][tenth]:,}" for figure in found.values())]
        for tenth, share in enumerate(shares)
        if tenth % 3 == 0
    ]
    rows.append(["an hour expires: seconds", *(f"{figure['expiry']['seconds']:,.3f}" for figure in found.values())])
    return _table([f"{first['rows']:,} rows, {first['mib']} MiB of memory", *found], rows)


def _verdict(let_in: bool) -> str:
    return "let in" if let_in else "refused"


def _machine(found: dict[str, Any]) -> str:
    return (
        f"Measured on {found['processors']} processors with {found['system']}, Python {found['python']}, "
        f"SQLite {found['sqlite']} and PostgreSQL {found['postgresql']} (shared_buffers {found['shared_buffers']}) "
        "over its socket; every commit of both is synced."
    )


def _runs(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return when each table was measured and how, and a warning where the machine was busy with something else."""
    rows, busy = [], []
    for name in (name for name in TABLES if name in runs):
        run = runs[name]
        revision = f"{run['version']}, {run.get('revision', 'no checkout')}" + (
            " and changes" if run.get("changed") else ""
        )
        rows.append(
            [name, run["date"], f"`{revision}`", f"{run['seconds']:,} s", told_load(run["busy"]), f"`{run['command']}`"]
        )
        if is_busy(run["busy"]):
            busy.append(name)
    lines = [_table(["table", "measured", "revision", "took", "load of others, before and after", "command"], rows)]
    if busy:
        lines.append(
            f"The machine was busy with other work at {', '.join(busy)}: look at how they relate, and no further."
        )
    if missing := [name for name in TABLES if name not in runs]:
        lines.append(f"Of earlier runs, which were not recorded: {', '.join(missing)}.")
    return "\n\n".join(lines)


def tell(results: Mapping[str, Any]) -> dict[str, str]:
    """Return what the page says in each of its places that these results can fill."""
    told = {name: table(results[name]) for name, table in TABLES.items() if name in results}
    return {"machine": f"{_machine(results['machine'])}\n\n{_runs(results['runs'])}", **told}


def replace_tables(page: str, told: dict[str, str]) -> str:
    """Return a page with what stands between `<!-- measured: NAME -->` and `<!-- end -->` replaced, by name."""
    for name, text in told.items():
        mark, end = f"<!-- measured: {name} -->\n", "<!-- end -->\n"
        before, found, rest = page.partition(mark)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"the page has no place for {name}")
        page = f"{before}{mark}{text}\n{end}{after}"
    return page


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "operations": _operations,
    "writers": _writers,
    "host": _host,
    "copies": _copies,
    "partitions": _partitions,
    "outgrown": _outgrown,
}
