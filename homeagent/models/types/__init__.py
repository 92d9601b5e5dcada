"""Types of fields and columns for text, timestamps, JSON, enums and flags.

Models validate fields, and stores validate arguments, by the same functions of this package.
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
