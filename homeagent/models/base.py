"""Base classes of the models. Do not postpone annotations (PEP 563) in a module of models. Postponed annotations slow
down the import.
"""

import copy
from collections.abc import Callable, Generator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform, get_args

from pydantic import AliasChoices, BaseModel, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType
from sqlalchemy import Index, MetaData, TextClause, inspect
from sqlalchemy.orm import registry
from sqlalchemy.orm.attributes import set_attribute
from sqlalchemy.orm.state import InstanceState
from sqlmodel import Field, SQLModel

# The next two imports use private names: SQLModel has no public counterparts. The context variable `finish_init` is
# False while SQLModel builds and validates an instance.
from sqlmodel._compat import SQLModelConfig, finish_init, is_table_model_class
from sqlmodel.main import FieldInfo, SQLModelMetaclass

from homeagent.errors import InvalidArgumentError
from homeagent.models.types import choose_column_type

T = TypeVar("T")

metadata: MetaData = MetaData(
    # Alembic can't change a constraint without a name.
    naming_convention={
        "ix": "idx_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)
"""Metadata of homeagent's tables (`homeagent.models.SCHEMA`), and of the application's subclasses of `Table`."""

_registry = registry(metadata=metadata)


# The context of another error type belongs to the application, and can contain the input.
_KNOWN_TYPES = frozenset(get_args(ErrorType))


def _line_without_input(line: Any) -> PydanticCustomError:
    copied = PydanticCustomError(line["type"], line["msg"], line.get("ctx") if line["type"] in _KNOWN_TYPES else None)
    # With a context, Pydantic replaces names in braces, such as {error}. A finished text must stay as it is.
    return copied if copied.message() == line["msg"] else PydanticCustomError(line["type"], line["msg"])


def _without_input(error: ValidationError) -> ValidationError:
    """Return a copy of the error without the input. The input can be a secret. Pydantic's setting
    `hide_input_in_errors` does not remove the input from `error.errors()`. FastAPI sends the result of `error.errors()`
    with status 422.
    """
    lines: list[Any] = error.errors(include_url=False, include_input=False)
    details = [InitErrorDetails(type=_line_without_input(line), loc=line["loc"], input=None) for line in lines]
    return ValidationError.from_exception_data(error.title, details, hide_input=True)


def hide_input(data: Any, handler: Callable[[Any], T]) -> T:
    """Call `handler(data)`. If the handler raises ValidationError, raise a copy without the data."""
    try:
        return handler(data)
    except ValidationError as error:
        without_input = _without_input(error)
    # Do not raise inside the `except` block. The error's `__context__` would show the input.
    raise without_input


def _kept_fields(model: type[SQLModel], update: Mapping[str, Any]) -> set[str]:
    """Return the names of the model's fields whose names and aliases are not in the update."""
    kept = set()
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        if update.keys().isdisjoint([name, *(each for each in choices if isinstance(each, str))]):
            kept.add(name)
    return kept


class Model(SQLModel, registry=_registry):
    """Base of all models. A model refuses unknown fields, and validates each assignment."""

    # Describe a field by `Field(description=…)`, not by a docstring. To read docstrings, Pydantic would parse the
    # source at each start.
    model_config: ClassVar[SQLModelConfig] = SQLModelConfig(
        extra="forbid",
        validate_assignment=True,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        hide_input_in_errors=True,
        from_attributes=True,
    )

    @model_validator(mode="wrap")
    @classmethod
    def _hide_input(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        return hide_input(data, handler)

    @classmethod
    def model_validate_json(cls, *args: Any, **kwargs: Any) -> Self:
        """Validate JSON text like Pydantic's method. An error does not show the JSON text."""
        # Pydantic's parser runs before `_hide_input()`, so handle the parser's errors here.
        return hide_input(None, lambda _: super(Model, cls).model_validate_json(*args, **kwargs))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy. Unlike Pydantic's method, validate the values in `update={…}`, which replace the copied
        values.
        """
        copied = super().model_copy(deep=deep)
        if not update:
            return copied
        kept = _kept_fields(type(self), update)
        # The validation would generate another value for a field with `default_factory`, such as `session_id`. Do not
        # pass the other defaults: a default of `AgentUpdate` is not a valid value.
        unset = kept - self.model_fields_set
        defaults = {name: type(self).model_fields[name].default for name in unset}
        generated = {name for name, default in defaults.items() if self.__dict__.get(name, default) is not default}
        values = {name: getattr(copied, name) for name in kept & self.model_fields_set | generated}
        made = type(self).model_validate({**values, **(copied.model_extra or {}), **update})
        made.model_fields_set.difference_update(generated)
        object.__setattr__(made, "__pydantic_private__", copied.__pydantic_private__)
        return made

    def __iter__(self) -> Generator[tuple[str, Any], None, None]:
        """Yield names and values, for example for `dict(device)`. Leave out the fields that dumps leave out."""
        fields = type(self).model_fields
        for name, value in super().__iter__():
            if name not in fields or not fields[name].exclude:
                yield name, value


class PartialIndex(Index):
    """An index of the rows that match a condition, on both engines. Do not use `Index(…, postgresql_where=…)`. With
    `postgresql_where=…`, SQLAlchemy would import its PostgreSQL package in every process.
    """

    def __init__(self, name: str, *columns: str, where: TextClause) -> None:
        super().__init__(name, *columns)
        self._where = where

    @cached_property
    def dialect_options(self) -> Any:
        """Return SQLAlchemy's options of the index. Add the index's condition for SQLite and for PostgreSQL."""
        options = super().dialect_options
        for dialect in ("sqlite", "postgresql"):
            options[dialect]["where"] = self._where
        return options


RESERVED_PREFIX = "homeagent_"

# Names of the tables of homeagent and Alembic, in lower case. SQLite ignores the case of a name.
_RESERVED_NAMES = frozenset(
    {"agents", "devices", "idempotency_keys", "nonces", "sessions", "store"}
    | {"device_changes", "application_schema_version", "alembic_version"}
)


def _is_own(model: type) -> bool:
    """Return True if the application, not homeagent, defines the model."""
    return not model.__module__.startswith("homeagent.")


def _check_table_name(model: type, name: str) -> None:
    lower = name.lower()
    if lower in _RESERVED_NAMES or lower.startswith((RESERVED_PREFIX, "sqlite_", "_alembic_tmp_")):
        raise InvalidArgumentError(
            f"the table name {name!r} of {model.__module__}.{model.__qualname__} is reserved: choose a name that is "
            f"not a table of homeagent and does not begin with {RESERVED_PREFIX!r}"
        )
    for table in metadata.tables.values():
        if table.name.lower() == lower:
            first = next((each.class_ for each in _registry.mappers if each.local_table is table), None)
            place = "a sqlalchemy.Table" if first is None else f"{first.__module__}.{first.__qualname__}"
            raise InvalidArgumentError(
                f"the table {name!r} of {model.__module__}.{model.__qualname__} is defined already, by {place}: choose "
                "another name, or import the module under one name and without a reload"
            )


@dataclass_transform(kw_only_default=True, field_specifiers=(Field, FieldInfo))
class _TableType(SQLModelMetaclass):
    """Metaclass that checks the table name of an application's model."""

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> None:
        if is_table_model_class(cls) and _is_own(cls) and not any(map(is_table_model_class, bases)):
            _check_table_name(cls, getattr(cls, "__tablename__"))  # noqa: B009  SQLModel declares no such attribute
        super().__init__(name, bases, namespace, **options)


class Table(Model, metaclass=_TableType):
    """Base class of table models. An application derives its own table models with the argument `table=True`.

    SQLModel does not validate a model with `table=True`. The class `Table` validates an instance on construction and on
    assignment. If an assignment raises `ValidationError`, the field keeps its old value. An instance that a store loads
    is not validated again.

    The documentation page "Add own tables" lists the column types. An unnamed constraint or index gets a name such as
    `fk_messages_session_id_sessions`.

    Raises (when the class is defined):
        InvalidArgumentError: if the name of the table is reserved or already in use. The error also occurs for a field
            of type `datetime` without `sa_type=` or `sa_column=`. Use the type `Timestamp` instead.
        TypeError: if the class derives from a table of homeagent.
    """

    __table__: ClassVar[Any]

    if TYPE_CHECKING:
        # At runtime, SQLAlchemy would look for the values of the attributes.
        __tablename__: ClassVar[str]
        __table_args__: ClassVar[Any]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.__pydantic_fields__.items():
            choose_column_type(field, f"{cls.__qualname__}.{name}")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a subclass of homeagent's tables. The subclass would have private fields, such as hashes."""
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[1:]:
            if "__table__" in vars(base) and not _is_own(base):
                raise TypeError(
                    f"{base.__name__} is a table of homeagent and can't have subclasses: for a request or a reply, "
                    f"derive {cls.__name__} from a schema, such as DevicePublic"
                )

    def __init__(self, **data: Any) -> None:
        if not is_table_model_class(type(self)) or not finish_init.get():
            super().__init__(**data)
            return
        related = {name: data.pop(name) for name in type(self).__sqlmodel_relationships__ if name in data}
        # SQLAlchemy does not notice values that the validator writes into the instance's dictionary. Restore the
        # dictionary, and set each field by `set_attribute()`.
        kept = self.__dict__.copy()
        type(self).__pydantic_validator__.validate_python(data, self_instance=self)
        values, fields_set = self.__dict__, self.__pydantic_fields_set__
        object.__setattr__(self, "__dict__", kept)
        for name, value in values.items():
            set_attribute(self, name, value)
        object.__setattr__(self, "__pydantic_fields_set__", fields_set)
        for name, value in related.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields or not finish_init.get():
            super().__setattr__(name, value)
            return
        # For a loaded instance, create SQLAlchemy's state first. After the assignment, the class `_StateOnDemand` could
        # not create the state.
        getattr(self, "_sa_instance_state", None)
        # Pydantic's validation replaces the instance's dictionary by a copy. If the instance kept the copy, a flush
        # would ignore values that a listener assigns (`test_a_listener_of_a_flush_assigns`).
        before = self.__dict__
        fields_set = self.__pydantic_fields_set__.copy()
        try:
            type(self).__pydantic_validator__.validate_assignment(self, name, value)
            value = self.__dict__[name]
            fields_set.add(name)
        finally:
            object.__setattr__(self, "__dict__", before)
            object.__setattr__(self, "__pydantic_fields_set__", fields_set)
        set_attribute(self, name, value)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # A loaded instance lacks Pydantic's attributes. Compute an attribute on access, so that loads stay fast.
            if name == "__pydantic_fields_set__":
                getattr(self, "_sa_instance_state", None)  # see `__setattr__`
                fields_set = set(type(self).model_fields)
                object.__setattr__(self, name, fields_set)
                return fields_set
            if name in {"__pydantic_extra__", "__pydantic_private__"}:
                return None
            return super().__getattr__(name)

    @classmethod
    def model_values(cls, **data: Any) -> dict[str, Any]:
        """Validate the values of a new row, and add the defaults. Return a dict from attribute name to value. A
        `Statement` takes column names: if the two names of a column differ, rename the key. The method is faster than
        creating an instance.
        """
        instance = object.__new__(cls)
        cls.__pydantic_validator__.validate_python(data, self_instance=instance)
        return instance.__dict__

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a new, validated instance that does not belong to an ORM session. The values in `update={…}` replace
        the copied values. With `deep=True`, also copy the values of JSON columns.
        """
        # Do not call Pydantic's `model_copy()`, which would copy SQLAlchemy's state.
        update = update or {}
        values = {name: getattr(self, name) for name in _kept_fields(type(self), update)}
        if deep:
            values = copy.deepcopy(values)
        return type(self)(**{**values, **update})

    def __getstate__(self) -> dict[Any, Any]:
        # Create SQLAlchemy's state for the pickle. After `pickle.loads()`, the class `_StateOnDemand` could not create
        # the state.
        getattr(self, "_sa_instance_state", None)
        return super().__getstate__()

    def __copy__(self) -> Self:
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy(deep=True)


def _is_loaded(instance: Table) -> bool:
    """Return True for a loaded instance without `__pydantic_fields_set__`."""
    try:
        _get_fields_set(instance)
    except AttributeError:
        return True
    return False


# Unlike a constructed instance, a loaded instance lacks the attribute `__pydantic_fields_set__`.
_get_fields_set: Any = BaseModel.__dict__["__pydantic_fields_set__"].__get__


class _StateOnDemand:
    """Creates SQLAlchemy's state when the ORM first uses a loaded instance. If each load created a state, loads would
    take more than twice as long.
    """

    def __get__(self, instance: Table | None, owner: type[Table]) -> InstanceState[Any]:
        if instance is None or not _is_loaded(instance):
            raise AttributeError("_sa_instance_state")
        mapper = inspect(owner)
        state: InstanceState[Any] = InstanceState(instance, mapper.class_manager)
        values = instance.__dict__
        names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        state.key = mapper.identity_key_from_primary_key(tuple(values[name] for name in names))
        # If two threads create the state, `setdefault()` gives both threads the same state.
        stored: InstanceState[Any] = values.setdefault("_sa_instance_state", state)
        return stored


class _Metadata:
    """The attribute `metadata`. Of a class, the attribute is SQLAlchemy's MetaData. Of an instance with the field
    `metadata_`, the attribute is the value of the field: Pydantic reads the attribute by the alias of the field.
    """

    def __get__(self, instance: Table | None, owner: type[Table]) -> Any:
        return metadata if instance is None else getattr(instance, "metadata_", metadata)


# In the class body, Pydantic would make `_sa_instance_state` a private attribute.
Table._sa_instance_state = _StateOnDemand()
Table.metadata = _Metadata()  # type: ignore[assignment]  # the type of the class's attribute stays
