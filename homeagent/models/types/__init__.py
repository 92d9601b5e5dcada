"""Types of fields and columns, and functions that validate values."""

from homeagent.models.types.enums import EnumColumn, FlagColumn
from homeagent.models.types.json_text import (
    MAX_JSON_BYTES,
    MAX_RESULT_BYTES,
    Json,
    JsonColumn,
    PairingJson,
    ResultJson,
    decode_json,
    encode_json,
)
from homeagent.models.types.limits import MAX_LIMIT, check_flag, check_limit, check_names
from homeagent.models.types.own_columns import choose_column_type
from homeagent.models.types.stored_values import (
    UNREADABLE,
    StoredColumn,
    naming_column,
    problem_of_stored,
    unreadable,
)
from homeagent.models.types.text import (
    INVISIBLE,
    MIN_SECRET_CHARACTERS,
    HashColumn,
    Identifier,
    Label,
    Name,
    SessionId,
    WorkspacePath,
    check_identifier,
    check_label,
    check_name,
    check_new_secret,
    check_optional_label,
    check_searched,
    text_column,
)
from homeagent.models.types.timestamps import (
    LONGEST_WAIT,
    MILLISECOND,
    Timestamp,
    TimestampColumn,
    check_duration,
    check_timestamp,
    check_wait,
    earlier,
    from_milliseconds,
    later,
    not_after,
    to_milliseconds,
)
