"""Find the index that refused a long value."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sqlalchemy import Index, LargeBinary, PrimaryKeyConstraint, String, UniqueConstraint

from homeagent.engine.driver_errors import refused_by
from homeagent.errors import InvalidArgumentError
from homeagent.models.base import metadata

_TOO_LONG = "54000"
_WRITTEN = re.compile(r'\s*(?:INSERT\s+INTO|UPDATE|COPY)\s+(?:ONLY\s+)?("[^"]+"|\w+)', re.IGNORECASE)


def index_error(error: BaseException, sql: str | None) -> InvalidArgumentError | None:
    """Return the error for a value that is too long for an index, or None. PostgreSQL names the index only for a value
    of at most 8,191 bytes, so the error for a longer value names each index that can contain long values.
    """
    if getattr(error, "sqlstate", None) != _TOO_LONG:
        return None
    table, index = refused_by(error)
    if table is None and (found := _WRITTEN.match(sql or "")) is not None:
        table = found[1].strip('"')
    names = sorted(_long_indexes(table)) if index is None else [index]
    if table is None:
        return None
    shown = " or ".join(map(repr, names)) or "an index"
    return InvalidArgumentError(
        f"a value is too long for {shown} of table {table!r}, because PostgreSQL indexes at most 2,704 bytes: shorten "
        f"the value, or index a hash of the value [SQLSTATE {_TOO_LONG}]"
    )


def _long_indexes(table: str | None) -> Iterator[str]:
    described = metadata.tables.get(table or "")
    if described is None:
        return
    for each in (*described.indexes, *described.constraints):
        if isinstance(each, (Index, PrimaryKeyConstraint, UniqueConstraint)):
            types = [getattr(column.type, "impl_instance", column.type) for column in each.columns]
            if any(isinstance(kind, (String, LargeBinary)) for kind in types):
                yield str(each.name)
