"""What all models share: own metadata, validation at every door, and errors that never show their input.

The modules of models leave `from __future__ import annotations` out: Pydantic and SQLAlchemy would evaluate every text
again for each class that inherits it, a twelfth of what the models take to be imported.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_args

from pydantic import BaseModel, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType
from sqlalchemy import Index, MetaData, TextClause, inspect
from sqlalchemy.orm import registry
from sqlalchemy.orm.attributes import set_attribute
from sqlalchemy.orm.state import InstanceState
from sqlmodel import SQLModel

# All are private to SQLModel and have no public counterpart: the type of its configuration, what tells that SQLModel
# itself is building an instance and will validate it by other means, and what `table=True` means.
from sqlmodel._compat import SQLModelConfig, finish_init, is_table_model_class

__all__ = ["Model", "PartialIndex", "Table", "hide_input", "metadata"]

T = TypeVar("T")

metadata = MetaData(
    # Every constraint has a name, or Alembic can't find it again to change it.
    naming_convention={
        "ix": "idx_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)
"""The tables of this package and no others: those of a host application never enter its migrations."""

_registry = registry(metadata=metadata)


# A validator may raise an error type of its own, which can't be built from its name.
_KNOWN_ERRORS = frozenset(get_args(ErrorType))


def _without_input(error: ValidationError) -> ValidationError:
    # `hide_input_in_errors` keeps the input out of the message alone: errors() and json(), which FastAPI answers a
    # 422 with, would still carry it, and it may be a secret.
    lines: list[InitErrorDetails] = []
    for line in error.errors(include_url=False, include_input=False):
        known = line["type"] in _KNOWN_ERRORS
        detail = InitErrorDetails(
            type=line["type"] if known else PydanticCustomError("invalid_value", "{reason}", {"reason": line["msg"]}),
            loc=line["loc"],
            input=None,
        )
        if known and "ctx" in line:
            detail["ctx"] = line["ctx"]
        lines.append(detail)
    return ValidationError.from_exception_data(error.title, lines, hide_input=True)


def hide_input(data: Any, handler: Callable[[Any], T]) -> T:
    """Validate by `handler`, and raise a ValidationError that does not carry what it refuses."""
    try:
        return handler(data)
    except ValidationError as error:
        refused = _without_input(error)
    # Raised outside the handler, or the original, which shows its input, would be its context.
    raise refused


class Model(SQLModel, registry=_registry):
    """The base of all models: unknown fields are refused, and an assignment is validated like a construction."""

    # Fields are described by `description=`: to find docstrings of attributes, Pydantic would parse the source of each
    # class, a tenth of the time that it takes to start.
    model_config = SQLModelConfig(
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
        """Validate JSON text as Pydantic does; text that is no JSON is not shown either."""
        # It is read before the model's own validator is called.
        return hide_input(None, lambda _: super(Model, cls).model_validate_json(*args, **kwargs))


class PartialIndex(Index):
    """An index of the rows that match a condition, on both engines.

    Do not use `Index(…, postgresql_where=…)`: SQLAlchemy would import its PostgreSQL package in every process.
    """

    def __init__(self, name: str, *columns: str, where: TextClause) -> None:
        super().__init__(name, *columns)
        self._where = where

    @cached_property
    def dialect_options(self) -> Any:
        """Options for each engine: the condition."""
        options = super().dialect_options
        for dialect in ("sqlite", "postgresql"):
            options[dialect]["where"] = self._where
        return options


class Table(Model):
    """The base of the table models, which validate as any Pydantic model does.

    SQLModel itself skips validation for `table=True`. Here a table is validated on construction and on assignment,
    and a refused assignment leaves the old value. It is not validated when it is loaded: what the database holds
    was validated when it came in.
    """

    __table__: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a subclass of one of homeagent's tables.

        SQLModel would take the subclass for a table too, and add its fields to the parent's. As a schema it would
        accept and hold what only the store may see, such as hashes of secrets.
        """
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[1:]:
            if "__table__" in vars(base) and base.__module__.startswith("homeagent."):
                raise TypeError(
                    f"{base.__name__} is a table of homeagent's and has no subclasses: for a request or a reply, "
                    f"derive {cls.__name__} from a schema, such as DevicePublic"
                )

    def __init__(self, **data: Any) -> None:
        if not is_table_model_class(type(self)) or not finish_init.get():
            super().__init__(**data)
            return
        # The validator writes the fields straight into __dict__, past SQLAlchemy's instrumentation: let it, then
        # put back what was there and set each field through the instrumentation.
        kept = self.__dict__.copy()
        type(self).__pydantic_validator__.validate_python(data, self_instance=self)
        values, fields_set = self.__dict__, self.__pydantic_fields_set__
        object.__setattr__(self, "__dict__", kept)
        for name, value in values.items():
            set_attribute(self, name, value)
        object.__setattr__(self, "__pydantic_fields_set__", fields_set)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields or not finish_init.get():
            super().__setattr__(name, value)
            return
        # Where it is made on demand, that is now: below, the value changes and with it what tells a loaded instance.
        getattr(self, "_sa_instance_state", None)
        # The dictionary itself and no copy of it: Pydantic puts another one in its place, and a flush that calls a
        # listener of `before_update` writes what it finds in the first (test_a_listener_of_a_flush_assigns).
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
            # A store fills in the fields of what it loads, and leaves out what is the same in all of it: to write
            # that took a third of the time that it takes to make an instance.
            if name == "__pydantic_fields_set__":
                # From now on this set is the instance's own; what tells a loaded instance goes with that.
                getattr(self, "_sa_instance_state", None)
                fields_set = set(type(self).model_fields)
                object.__setattr__(self, name, fields_set)
                return fields_set
            if name in {"__pydantic_extra__", "__pydantic_private__"}:
                return None
            return super().__getattr__(name)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a new, transient instance with the same values, validated.

        Args:
            update: values that replace those of this instance.
            deep: whether JSON values are copied as well.
        """
        # Pydantic's own copies __dict__, and with it the state that ties this very instance to an ORM session.
        values = {name: getattr(self, name) for name in type(self).model_fields}
        if deep:
            values = copy.deepcopy(values)
        return type(self)(**{**values, **(update or {})})

    def __getstate__(self) -> dict[Any, Any]:
        # What is made on demand can't be made any more after a copy of `__dict__` in another process.
        getattr(self, "_sa_instance_state", None)
        return super().__getstate__()

    def __copy__(self) -> Self:
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy(deep=True)


def _is_loaded(instance: Table) -> bool:
    """Tell whether a store loaded this instance, and nobody asked for its `model_fields_set` since."""
    try:
        _get_fields_set(instance)
    except AttributeError:
        return True
    return False


# The slot itself, which whatever makes an instance but a store fills in.
_get_fields_set: Any = BaseModel.__dict__["__pydantic_fields_set__"].__get__


class _StateOnDemand:
    """SQLAlchemy's state of an instance that a store loaded, made when the ORM first asks for it.

    Making one takes longer than everything else about a loaded instance, and few ever meet the ORM. An instance that
    was constructed has a state of its own, in its `__dict__`, which comes before this.
    """

    def __get__(self, instance: Table | None, owner: type[Table]) -> InstanceState[Any]:
        if instance is None or not _is_loaded(instance):
            raise AttributeError("_sa_instance_state")
        mapper = inspect(owner)
        state: InstanceState[Any] = InstanceState(instance, mapper.class_manager)
        values = instance.__dict__
        names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        state.key = mapper.identity_key_from_primary_key(tuple(values[name] for name in names))
        # Of two threads that ask at once, both get the first one's.
        made: InstanceState[Any] = values.setdefault("_sa_instance_state", state)
        return made


# In the body of the class, Pydantic would take the name for a private attribute.
Table._sa_instance_state = _StateOnDemand()
