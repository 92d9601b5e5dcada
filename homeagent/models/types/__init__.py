"""Field types of the models, each with its column type: a file for text, instants, JSON and what is closed.

What a field accepts is decided here once, and used by the models when they validate and by the stores when an
argument comes in by itself, so that a bad id is refused alike at every door.
"""

from homeagent.models.types.enums import EnumColumn, FlagColumn
from homeagent.models.types.json_text import MAX_JSON_BYTES, Json, JsonColumn, decode_json, encode_json
from homeagent.models.types.limits import MAX_LIMIT, check_limit
from homeagent.models.types.stored_values import UNREADABLE, loaded, naming_column, unreadable, unreadable_in
from homeagent.models.types.text import (
    Identifier,
    Label,
    OptionalLabel,
    WorkspacePath,
    check_identifier,
    check_label,
    check_new_secret,
    check_optional_label,
    text_column,
)
from homeagent.models.types.timestamps import (
    EPOCH,
    LONGEST_WAIT,
    MILLISECOND,
    Timestamp,
    TimestampColumn,
    check_duration,
    check_timestamp,
    check_wait,
    earlier,
    later,
    not_after,
    to_milliseconds,
)

__all__ = [
    "EPOCH",
    "LONGEST_WAIT",
    "MAX_JSON_BYTES",
    "MAX_LIMIT",
    "MILLISECOND",
    "UNREADABLE",
    "EnumColumn",
    "FlagColumn",
    "Identifier",
    "Json",
    "JsonColumn",
    "Label",
    "OptionalLabel",
    "Timestamp",
    "TimestampColumn",
    "WorkspacePath",
    "check_duration",
    "check_identifier",
    "check_label",
    "check_limit",
    "check_new_secret",
    "check_optional_label",
    "check_timestamp",
    "check_wait",
    "decode_json",
    "earlier",
    "encode_json",
    "later",
    "loaded",
    "naming_column",
    "not_after",
    "text_column",
    "to_milliseconds",
    "unreadable",
    "unreadable_in",
]
