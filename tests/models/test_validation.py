"""Tables that are Pydantic models: validated at construction and assignment, never on load; errors show no secret."""

from __future__ import annotations

import copy
import json
import pickle
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic import Field as PlainField
from pydantic_core import PydanticCustomError
from sqlalchemy import inspect
from sqlalchemy.engine.default import DefaultDialect
from sqlmodel import Field, SQLModel
from sqlmodel._compat import SQLModelConfig

from homeagent import (
    Agent,
    AgentPublic,
    AgentSession,
    AgentSessionCreate,
    AgentSessionPublic,
    AgentUpdate,
    Device,
    DeviceCreate,
    DevicePair,
    DevicePublic,
    DeviceUpdate,
    IdempotencyKey,
    IdempotencyScope,
    Nonce,
    Role,
)
from homeagent.engine.statements import as_loaded
from homeagent.errors import CorruptDatabaseError, InvalidArgumentError
from homeagent.models import SCHEMA, TABLES, metadata
from homeagent.models.base import Model
from homeagent.models.session import new_session_id, route_key
from homeagent.models.types import EnumColumn, JsonColumn

NOW = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
SECRET = "no-error-may-show-this"

ROWS: dict[type[SQLModel], dict[str, Any]] = {
    Device: {"id": "d", "role": "admin", "shared_secret_hash": SECRET, "paired_at": NOW},
    Agent: {"id": "a", "name": "A", "workspace_path": "/srv/a", "created_at": NOW},
    AgentSession: {"session_id": "s", "agent_id": "a", "created_at": NOW, "last_active_at": NOW},
    Nonce: {"nonce": SECRET, "device_id": "d", "created_at": NOW, "expires_at": NOW},
    IdempotencyKey: {
        "key": SECRET, "method": "m", "device_id": "d", "result": {"answer": SECRET},
        "created_at": NOW, "expires_at": NOW,
    },
}  # fmt: skip


def shown(error: ValidationError) -> str:
    """Return all texts of an error."""
    return f"{error} {error!r} {error.errors()} {error.json()} {error.__cause__} {error.__context__}"


@pytest.mark.parametrize("model", ROWS, ids=lambda model: model.__name__)
def test_a_table_refuses_a_missing_and_an_unknown_field(model: type[SQLModel]) -> None:
    """If a field is missing or unknown, construction raises an error, unlike in SQLModel's own tables."""
    values = ROWS[model]
    assert model(**values)
    for name in values:
        with pytest.raises(ValidationError) as refused:
            model(**{key: value for key, value in values.items() if key != name})
        assert refused.value.errors()[0]["type"] == "missing"
    with pytest.raises(ValidationError):
        model(**values, unheard_of=1)
    with pytest.raises(ValidationError):
        model.model_validate({**values, "unheard_of": 1})


BAD_IDS = [
    "", "x" * 513, "é" * 257, "a\\b", "a/../b", "./a", "..", "a\u00adb", "a\u200bb", "a\u034fb", "a\u3164",
    "a\U000e0041", "a\ufe0f", "\u200da", "a\u200d", "1\u200d2", "a\u200c\u200db", "a\x00b", "a\nb", "a\u202eb",
    "a\ud800",
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("id", bad) for bad in BAD_IDS),
        ("role", "owner"),
        ("paired_at", NOW.replace(tzinfo=None)),
        ("paired_at", 1_700_000_000),
        ("paired_at", "-19466"),
        ("paired_at", 10**400),
        ("last_seen_at", "yesterday"),
        ("metadata_", {"a": float("nan")}),
        ("metadata_", {"a": {1, 2}}),
        ("metadata_", {1: "a"}),
        ("metadata_", {"a": "x" * 262_144}),
        ("metadata_", ["\ud800"]),
    ],
)
def test_bad_value_is_refused_at_construction_and_assignment(field: str, value: object) -> None:
    """Construction and assignment refuse the same values, and a refused assignment changes no field."""
    with pytest.raises(ValidationError):
        Device(**{**ROWS[Device], field: value})
    device = Device(**ROWS[Device], last_seen_at=NOW, metadata_={"kept": True})
    before, fields_set = device.model_dump(), set(device.model_fields_set)
    with pytest.raises(ValidationError):
        setattr(device, field, value)
    assert device.model_dump() == before
    assert device.model_fields_set == fields_set
    assert getattr(device, field) != value


def test_a_good_id_is_accepted() -> None:
    """An id can have 512 bytes and slashes, and joiners between letters or emoji."""
    for identifier in (
        "x" * 512, "é" * 256, "a/b//c/", "...", "a..b/.c", "می\u200cخواهم", "क्\u200dष", "\u2194\ufe0f",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f469\U0001f3fd\u200d\u2695\ufe0f",
    ):  # fmt: skip
        assert Device(**{**ROWS[Device], "id": identifier}).id == identifier


def test_limits_of_texts() -> None:
    """A session's id has up to 1,024 bytes, and metadata of a pairing request up to 16 KiB of JSON."""
    assert AgentSessionCreate(session_id="s" * 1024, agent_id="a", sender_id="\u200e" * 341).sender_id
    for values in ({"session_id": "s" * 1025}, {"sender_id": "\u200e" * 342}, {"agent_id": "a" * 513}):
        with pytest.raises(ValidationError):
            AgentSessionCreate(**{"agent_id": "a", **values})
    assert DevicePair(id="d", role=Role.NODE, metadata="x" * 16_382)
    with pytest.raises(ValidationError, match="16,384 bytes"):
        DevicePair(id="d", role=Role.NODE, metadata="x" * 16_383)
    assert DeviceCreate(id="d", role=Role.NODE, shared_secret_hash="h", metadata="x" * 16_383)
    for bad in ("n" * 513, "\u202en", "", None):
        with pytest.raises(ValidationError):
            AgentUpdate(name=bad)  # type: ignore[arg-type]  # a JSON body may have null


def test_an_assignment_reaches_the_orm() -> None:
    """A valid assignment is converted and seen by SQLAlchemy as a change; a mistyped name raises an error."""
    device = Device(**ROWS[Device])
    with pytest.raises(ValidationError):
        device.aproved = True
    device.role = "node"  # type: ignore[assignment]  # a caller without a type checker
    assert device.role is Role.NODE
    assert "role" in device.model_fields_set
    assert inspect(device).attrs.role.history.added == [Role.NODE]


def test_timestamp_is_utc_in_whole_milliseconds() -> None:
    """Another time zone, also in a text, is converted to UTC and cut to milliseconds, also before 1970."""
    device = Device(**{**ROWS[Device], "paired_at": NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))})
    assert device.paired_at == NOW.replace(microsecond=123000)
    assert device.paired_at.tzinfo is UTC
    for given, stored in (("2026-01-02T03:04:05.5Z", 5.5), ("2026-01-02T04:04:06+01:00", 6)):
        expected = datetime(2026, 1, 2, 3, 4, tzinfo=UTC) + timedelta(seconds=stored)
        assert Device(**{**ROWS[Device], "paired_at": given}).paired_at == expected
    early = Device(**{**ROWS[Device], "paired_at": datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)})
    assert early.paired_at == datetime(1969, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)


@pytest.mark.parametrize("model", ROWS, ids=lambda model: model.__name__)
def test_no_error_and_no_repr_shows_a_secret(model: type[SQLModel]) -> None:
    """The message, errors() and json() of a refusal omit the input; a repr omits hash, nonce and result."""
    assert SECRET not in repr(model(**ROWS[model]))
    for values in ({**ROWS[model], "unheard_of": SECRET}, {**ROWS[model], next(iter(ROWS[model])): {"deep": SECRET}}):
        with pytest.raises(ValidationError) as refused:
            model(**values)
        assert SECRET not in shown(refused.value)


def test_the_hash_is_in_no_dump_and_in_no_public_schema() -> None:
    """A device's hashes are readable as attributes only, and are in no dump, dict() and public schema."""
    device = Device(**ROWS[Device], previous_secret_hash=SECRET, proof_verifier=SECRET)
    public = DevicePublic.model_validate(device, from_attributes=True)
    create = DeviceCreate(id="d", role=Role.CLIENT, shared_secret_hash=SECRET, proof_verifier=SECRET)
    pair = DevicePair(id="d", role=Role.CLIENT, shared_secret=SECRET)
    for model in (device, public, create, pair):
        shown = f"{model!r} {model} {model.model_dump()} {model.model_dump_json()} {model.model_dump(by_alias=True)}"
        assert SECRET not in f"{shown} {dict(model)}"
        assert model.id == dict(model)["id"] == "d"  # type: ignore[attr-defined]  # each model has an id
    schema = json.dumps([DevicePublic.model_json_schema(), DevicePair.model_json_schema()])
    assert "hash" not in schema
    assert "verifier" not in schema
    copied = create.model_copy(update={"role": Role.NODE})
    assert device.shared_secret_hash == create.shared_secret_hash == copied.shared_secret_hash == SECRET
    assert copied != create == create.model_copy() != DeviceCreate(id="d", role=Role.CLIENT, shared_secret_hash="h")


class DeviceView(DevicePublic):
    extra: int


def test_metadata_is_a_field_a_column_and_an_alias() -> None:
    """The attribute is metadata_, its public name is metadata, and a public model reads it from a row."""
    device = Device(**ROWS[Device], metadata={"room": "kitchen"})
    assert device.metadata_ == {"room": "kitchen"}
    assert device.model_dump()["metadata"] == {"room": "kitchen"}
    assert Device.metadata is metadata
    public = DevicePublic.model_validate(device, from_attributes=True)
    assert public.metadata_ == public.metadata == {"room": "kitchen"}
    assert json.loads(public.model_dump_json())["metadata"] == {"room": "kitchen"}
    assert DevicePublic.model_validate(public.model_dump()) == public
    # An application can derive its own reply and add fields.
    view = DeviceView.model_validate(device, update={"extra": 1})
    assert (view.extra, view.metadata_, "shared_secret_hash" in view.model_dump()) == (1, public.metadata_, False)
    agent = AgentPublic.model_validate(Agent(**ROWS[Agent]), from_attributes=True)
    session = AgentSessionPublic.model_validate(AgentSession(**ROWS[AgentSession]), from_attributes=True)
    assert (agent.id, session.session_id) == ("a", "s")
    assert "route_key" not in AgentSessionPublic.model_json_schema()["properties"]
    assert DeviceUpdate(metadata=None).model_fields_set == {"metadata_"}
    assert DeviceUpdate().model_fields_set == set()


class RoomOfDevice(BaseModel, from_attributes=True):
    """A reply of an application that does not use homeagent's schemas."""

    metadata: dict[str, str]


@pytest.mark.parametrize("loaded", [True, False])
def test_metadata_of_a_row_is_read(loaded: bool) -> None:
    """A table, a request, a reply and a model of the application read the metadata of a row."""
    rows: list[Any] = [Device(**ROWS[Device], metadata={"room": "k"}), AgentSession(**ROWS[AgentSession])]
    if loaded:
        rows = [as_loaded(type(row), {name: getattr(row, name) for name in type(row).model_fields}) for row in rows]
    device, session = rows
    models: list[Any] = [Device, DeviceCreate, DevicePublic]
    assert [model.model_validate(device).metadata_ for model in models] == [{"room": "k"}] * 3
    models = [AgentSession, AgentSessionCreate, AgentSessionPublic]
    assert [model.model_validate(session).metadata_ for model in models] == [None] * 3
    assert RoomOfDevice.model_validate(device).metadata == {"room": "k"}


@pytest.mark.parametrize("schema", [DevicePublic, AgentSessionPublic, DevicePair])
@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_the_json_schema_names_the_metadata(schema: type[Model], mode: Any) -> None:
    """Both JSON schemas of a request or a reply, and of a subclass, have the name `metadata` of the JSON text."""
    subclass = type("Named", (schema,), {"__module__": __name__})
    for model in (schema, subclass):
        assert {"metadata", "metadata_"} & model.model_json_schema(mode=mode)["properties"].keys() == {"metadata"}


class Renamed(AgentUpdate):
    """An application's request with aliases of a field."""

    token: str = PlainField(default="", validation_alias=AliasChoices(AliasPath("tokens", 0), "tok", "token2"))


def test_a_copy_takes_a_name_or_an_alias() -> None:
    """A copy of a row, a request or a reply accepts each name of a field in `update={…}`."""
    device = Device(**ROWS[Device], metadata={"a": 1})
    for model in (device, DevicePublic.model_validate(device), DevicePair(id="d", role=Role.NODE, metadata={"a": 1})):
        for name in ("metadata", "metadata_"):
            assert model.model_copy(update={name: {"b": 2}}).model_dump()["metadata"] == {"b": 2}
    for name in ("token", "tok", "token2"):
        assert Renamed(token="t").model_copy(update={name: "new"}).token == "new"


def test_a_copy_is_an_instance_of_its_own() -> None:
    """A copied or pickled table instance has equal values, and shares no ORM state with the original."""
    device = Device(**ROWS[Device], metadata={"a": [1]})
    for twin in (device.model_copy(), copy.copy(device), copy.deepcopy(device)):
        assert twin == device
        assert twin.shared_secret_hash == SECRET
        assert inspect(twin) is not inspect(device)
    deep = copy.deepcopy(device)
    deep.metadata_["a"].append(2)  # type: ignore[index, union-attr, call-overload]  # the dict from above
    assert device.metadata_ == {"a": [1]}
    assert device.model_copy(update={"role": "node"}).role is Role.NODE
    with pytest.raises(ValidationError):
        device.model_copy(update={"role": "owner"})
    assert pickle.loads(pickle.dumps(device)) == device  # noqa: S301  bytes from this test


def test_a_copy_of_a_request_is_validated() -> None:
    """If `update={…}` has an invalid or unknown value, a copy of a request raises an error that shows no secret."""
    request = DevicePair(id="d", role=Role.NODE, shared_secret="right-" + SECRET, metadata={"a": [1]})
    for update in ({"id": "../d"}, {"role": "owner"}, {"shared_secret": SECRET[:7]}, {"aproved": SECRET}):
        with pytest.raises(ValidationError) as refused:
            request.model_copy(update=update)
        assert SECRET[:7] not in shown(refused.value)
    renamed = request.model_copy(update={"id": "e"}, deep=True)
    assert (renamed.id, request.id) == ("e", "d")
    assert renamed.metadata_ == request.metadata_
    assert renamed.metadata_ is not request.metadata_
    assert request.model_copy(update={"metadata": {"b": 2}}).metadata_ == {"b": 2}
    # An omitted field stays unset.
    assert AgentUpdate().model_copy(update={"name": "A"}).model_fields_set == {"name"}


class Range(AgentUpdate):
    """An application's request with a rule for two fields."""

    model_config = SQLModelConfig(frozen=True)
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


def test_a_copy_is_validated_once() -> None:
    """A copy of a frozen request has the new values, and a rule for two fields sees both new values."""
    copied = Range().model_copy(update={"low": 5, "high": 9})
    assert (copied.low, copied.high) == (5, 9)
    with pytest.raises(ValidationError):
        Range().model_copy(update={"low": 5})


class Open(AgentUpdate):
    """An application's request with a generated value, a list, a private attribute and unknown fields."""

    model_config = SQLModelConfig(extra="allow")
    request_id: str = Field(default_factory=new_session_id)
    tags: list[str] = Field(default=[])
    _token: str = PrivateAttr(default="")


def test_a_copy_keeps_generated_values() -> None:
    """A copy with `update={…}` keeps generated values, changed lists, private attributes and extra values."""
    session = AgentSessionCreate(agent_id="a")
    copied = session.model_copy(update={"channel_id": "c"})
    assert (copied.session_id, copied.channel_id) == (session.session_id, "c")
    assert copied.model_fields_set == {"agent_id", "channel_id"}
    assert session.model_copy(update={"session_id": "s"}).session_id == "s"
    request = Open.model_validate({"colour": "red"})
    request.tags.append("x")
    request._token = SECRET
    changed = request.model_copy(update={"name": "n"})
    assert changed.model_dump() == {**request.model_dump(), "name": "n"}
    assert changed._token == SECRET
    assert changed.model_fields_set == {"colour", "name"}
    assert request.model_copy(update={"colour": "blue"}).model_extra == {"colour": "blue"}
    with pytest.raises(ValidationError, match="agent_id"):
        AgentSessionCreate.model_construct().model_copy(update={"channel_id": "c"})


def test_a_session_id_is_a_uuid_of_version_7() -> None:
    """A generated session id is a UUID of version 7 (RFC 9562), so that ids sort by creation time."""
    made = [AgentSessionCreate(agent_id="a").session_id for _ in range(100)] + [new_session_id()]
    assert len(set(made)) == 101
    assert {session_id[14] for session_id in made} == {"7"}
    assert {session_id[19] for session_id in made} <= set("89ab")
    assert [session_id[:13] for session_id in made] == sorted(session_id[:13] for session_id in made)


def test_routes_differ_if_their_parts_differ() -> None:
    """An absent sender differs from an empty name, and a separator inside a name does not split the name."""
    names = (None, "null", "b", "b,c")
    routes = {route_key("a", sender, channel) for sender in names for channel in names}
    assert len(routes | {route_key('a","b', None, "c")}) == len(names) ** 2 + 1
    assert route_key("a", None, None) in routes


def test_a_scope_is_validated_and_frozen() -> None:
    """A scope with an invalid part raises an error, a valid scope cannot be changed, and its repr omits the key."""
    wrong = [("", "m", "k"), ("d/..", "m", "k"), ("d", "", "k"), ("d", "m", ""), ("d", "m", "\n"), ("d", "m", "\0")]
    other_types: list[Any] = [(7, "m", "k"), ([], "m", "k"), ("d", {}, "k"), ("d", "m", None)]
    for scope in (*wrong, *other_types, ("d", "m", "k" * 1025), ("d", "m" * 513, "k")):
        with pytest.raises(InvalidArgumentError):
            IdempotencyScope(*scope)
    good = IdempotencyScope(device_id="d", method="m", key=SECRET)
    with pytest.raises(AttributeError):
        good.key = "other"  # type: ignore[misc]  # the assignment must fail
    assert SECRET not in repr(good)
    assert good == IdempotencyScope("d", "m", SECRET)


@pytest.mark.parametrize(
    "wrong",
    [{"device_id": f"../{SECRET}"}, {"key": f"{SECRET}\n"}, {"method": ""}, {"key": 5}, {"approved": SECRET}],
    ids=["path", "control character", "empty", "int", "unknown"],
)
def test_scope_is_validated_as_a_field(wrong: dict[str, Any]) -> None:
    """If a scope is a field of a request body, it accepts the same values and shows no key."""

    class Request(BaseModel):
        scope: IdempotencyScope

    parts = {"device_id": "lamp", "method": "m", "key": "k"}
    scope = IdempotencyScope(**parts)
    assert Request.model_validate({"scope": parts}).scope == Request(scope=scope).scope == scope
    assert Request.model_validate_json(Request(scope=scope).model_dump_json()).scope == scope
    with pytest.raises(ValidationError) as refused:
        Request.model_validate({"scope": {**parts, **wrong}})
    assert SECRET not in shown(refused.value)


class Body(BaseModel):
    """A request body with a nested request model, as in FastAPI."""

    pair: DevicePair


@pytest.mark.parametrize(
    "end", ["x" * 512, "\N{EURO SIGN}" * 400, "\0", "\ud800"], ids=["characters", "bytes", "NUL", "surrogate"]
)
def test_a_chosen_secret_that_pair_can_not_use(end: str) -> None:
    """If a chosen secret is too long or has an invalid character, `DevicePair` raises an error without the secret."""
    with pytest.raises(ValidationError, match=r"a secret must (have at most|be at most|have no)") as refused:
        DevicePair(id="d", role=Role.NODE, shared_secret=SECRET + end)
    assert SECRET not in shown(refused.value)


def test_the_schema_of_a_chosen_secret() -> None:
    """The JSON schema of `DevicePair` names the limits of a chosen secret."""
    secret, null = DevicePair.model_json_schema()["properties"]["shared_secret"]["anyOf"]
    assert (secret["minLength"], secret["maxLength"], null) == (8, 512, {"type": "null"})
    for text in (SECRET, "Passwort für Gäste"):
        assert re.search(secret["pattern"], text)
    assert not re.search(secret["pattern"], SECRET + "\0")


@pytest.mark.parametrize("secret", [SECRET, {"nested": SECRET}, [SECRET]], ids=["text", "object", "list"])
def test_a_refused_body_shows_no_secret(secret: object) -> None:
    """If a body is refused or is not JSON, the error omits the body, because it may contain a secret."""
    body = {"id": "", "role": "client", "shared_secret": secret}
    with pytest.raises(ValidationError) as refused:
        Body.model_validate({"pair": body})
    assert SECRET not in shown(refused.value)
    for model in (Device, DevicePair, DeviceCreate):
        with pytest.raises(ValidationError, match="JSON") as refused:
            model.model_validate_json(json.dumps(body)[:-1])
        assert SECRET not in shown(refused.value)


def test_error_of_a_column_type_has_no_context() -> None:
    """If a column type can't convert a value, the error has no context, which would show the value."""
    dialect = DefaultDialect()
    with pytest.raises(InvalidArgumentError, match="not a member of Role") as refused:
        EnumColumn(Role).process_bind_param(SECRET, dialect)
    assert refused.value.__context__ is None
    for column in (JsonColumn(), EnumColumn(Role)):
        with pytest.raises(CorruptDatabaseError) as unreadable:
            column.process_result_value(SECRET, dialect)
        assert unreadable.value.__context__ is None


class Guarded(Model):
    """A model whose validator raises the error that is the value of a field."""

    raised: Any = None
    size: int = Field(default=3, ge=3)

    @field_validator("raised")
    @classmethod
    def _raise(cls, value: Any) -> Any:
        raise value


class Parent(Model):
    child: Guarded


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"size": 1}, {"type": "greater_than_equal", "ctx": {"ge": 3}}),
        ({"raised": ValueError("no {error}")}, {"type": "value_error", "msg": "Value error, no {error}"}),
        ({"raised": AssertionError("no {error}")}, {"type": "assertion_error", "msg": "Assertion failed, no {error}"}),
        ({"raised": PydanticCustomError("own", "no {x}", {"x": 1, "y": SECRET})}, {"type": "own", "msg": "no 1"}),
        ({"raised": PydanticCustomError("value_error", "no {x}", {"x": 1})}, {"msg": "no 1", "ctx": {"x": 1}}),
    ],
    ids=["constraint", "value error", "assertion", "own type", "own text"],
)
def test_a_copied_error_keeps_its_text(values: dict[str, Any], line: dict[str, Any]) -> None:
    """An error without its input has the text of Pydantic's error, and no context of an application's own type."""
    for model, given in ((Guarded, values), (Parent, {"child": values})):
        with pytest.raises(ValidationError) as refused:
            model.model_validate(given)
        (found,) = refused.value.errors()
        assert line.items() <= found.items()
        assert "ctx" in line or "ctx" not in found
        assert SECRET not in shown(refused.value)
        copied = pickle.loads(pickle.dumps(refused.value))  # noqa: S301  bytes from this test
        assert found["msg"] in f"{refused.value} {copied}"


def test_tables_have_separate_metadata() -> None:
    """A host application's metadata has no table of homeagent, and each constraint of homeagent has a name."""
    assert not set(TABLES) & set(SQLModel.metadata.tables)
    assert set(TABLES) == {"agents", "device_changes", "devices", "idempotency_keys", "nonces", "sessions", "store"}
    assert all(constraint.name for table in SCHEMA for constraint in table.constraints)
    # Each table follows the tables that its foreign keys refer to.
    for place, table in enumerate(SCHEMA):
        assert {key.column.table for key in table.foreign_keys} <= set(SCHEMA[:place])


@pytest.mark.parametrize("table", [Device, AgentSession, Nonce])
@pytest.mark.parametrize("options", [{}, {"table": True}])
def test_tables_have_no_subclasses(table: Any, options: dict[str, bool]) -> None:
    """If a table is subclassed, the error names the schema to derive from instead; a subclass would add columns."""
    columns = list(table.__table__.columns)
    namespace = {"__annotations__": {"extra": int}, "__module__": __name__}
    with pytest.raises(TypeError, match=rf"^{table.__name__} is a table .*derive View from .* such as DevicePublic"):
        type(table)("View", (table,), namespace, **options)
    assert list(table.__table__.columns) == columns
