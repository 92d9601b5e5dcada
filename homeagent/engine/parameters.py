"""Convert the parameters of a statement to the values of its placeholders. Refuse absent and unknown parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import Dialect, Insert

from homeagent.engine.conversions import hiding_parameter
from homeagent.errors import InvalidArgumentError

if TYPE_CHECKING:
    from sqlalchemy.sql.compiler import SQLCompiler


def column_keys(expression: Any) -> list[str] | None:
    """Return the table's column names for an INSERT that lists no values. For other statements, return None. Leave out
    computed columns, and a key that the database assigns.
    """
    # SQLAlchemy has no public attributes for the values of an INSERT.
    if not isinstance(expression, Insert) or expression._values or expression._multi_values:
        return None
    if expression.select is not None:
        return None
    absent = _columns_without_parameter(expression.table)
    return [key for key in expression.table.columns.keys() if key not in absent]  # noqa: SIM118  not a dict


def _columns_without_parameter(table: Any) -> list[str]:
    """Return the computed columns' names, and the name of a key that the database assigns."""
    assigned = getattr(table, "autoincrement_column", None)
    return [each.key for each in getattr(table, "columns", ()) if each.computed is not None or each is assigned]


def _defaults(compiled: Any) -> dict[str, Callable[[], Any]]:
    """For each omitted column with a default, return a function. The function returns the default value."""
    defaults = {column.key: column.default for column in compiled.insert_prefetch}
    defaults |= {column.key: column.onupdate for column in compiled.update_prefetch}
    return {
        key: partial(each.arg, None) if each.is_callable else partial(getattr, each, "arg")
        for key, each in defaults.items()
    }


def binder(
    compiled: SQLCompiler, dialect: Dialect, *, ignores_unknown: bool
) -> Callable[[dict[str, Any]], Sequence[Any]]:
    """Generate a function that converts parameters to placeholder values. A loop would take three times as long."""
    defaults = _defaults(compiled)
    accepted: set[str] = set()
    # With the name of this module, `clear_locals()` clears the values in a traceback.
    namespace: dict[str, Any] = {"__name__": __name__, "_missing": _missing}
    given: dict[str, str] = {}
    converted: dict[tuple[str, Any], str] = {}
    values = []
    for index, name in enumerate(compiled.positiontup or ()):
        parameter = compiled.binds[name]
        # Call the type's conversion directly, because SQLAlchemy's layers are slow.
        direct = getattr(parameter.type, "convert_bound", None)
        convert: Any = parameter.type.dialect_impl(dialect).bind_processor(dialect)
        if convert is not None and direct is None:
            convert = hiding_parameter(convert, parameter.key)
        if not parameter.required and parameter.key not in defaults:
            # SQLAlchemy makes parameters from constants too, as in `approved == False`.
            constant = parameter.effective_value
            namespace[f"constant{index}"] = convert(constant) if convert else constant
            values.append(f"constant{index}")
            continue
        accepted.add(parameter.key)
        namespace[f"convert{index}"] = convert and (direct or convert)
        namespace[f"default{index}"] = defaults.get(parameter.key)
        key = f"given[{parameter.key!r}]"
        if parameter.key in defaults:
            key += f" if {parameter.key!r} in given else default{index}()"
        value = given.setdefault(key, f"value{len(given)}")
        if convert is None:
            values.append(value)
        elif direct is None:
            values.append(f"convert{index}({value})")
        elif (value, direct) in converted:
            values.append(converted[value, direct])
        else:
            converted[value, direct] = f"bound{index}"
            values.append(f"(bound{index} := None if {value} is None else convert{index}({value}))")
    table = getattr(compiled.statement, "table", None)
    ignored = set(_columns_without_parameter(table)) - accepted
    # `Table.model_values()` contains None for a key that the database assigns. Do not ignore a chosen key.
    assigned = getattr(getattr(table, "autoincrement_column", None), "key", None)
    namespace["refuse_unknown"] = partial(_refuse_unknown, accepted, ignored, assigned)
    namespace["accepts"] = frozenset(accepted | ignored).issuperset
    has_no_key = f" and given.get({assigned!r}) is None" if assigned in ignored else ""
    has_only_known = ignores_unknown or f"accepts(given){has_no_key}"
    # Convert outside the `try` block, because a conversion can raise KeyError too.
    source = f"""
def bind(given):
    try:
        {"; ".join(f"{value} = {key}" for key, value in given.items()) or "pass"}
    except KeyError as error:
        raise _missing(error) from None
    {has_only_known} or refuse_unknown(given)
    return ({"".join(f"{value}, " for value in values)})
"""
    exec(source, namespace)  # noqa: S102  built from the names of parameters only
    return namespace["bind"]  # type: ignore[no-any-return]  # generated above


def _refuse_unknown(accepted: set[str], ignored: set[str], assigned: str | None, given: dict[str, Any]) -> None:
    """Raise InvalidArgumentError for a name that is not a parameter of the statement, or for a chosen key."""
    refused = [
        name for name in given if name not in accepted | ignored or (name == assigned and given[name] is not None)
    ]
    shown = ", ".join(sorted(accepted)) or "none"
    raise InvalidArgumentError(f"the statement has no parameter {refused[0]!r}. The parameters are: {shown}")


def _missing(error: KeyError) -> InvalidArgumentError:
    return InvalidArgumentError(f"the statement needs a value for the parameter {error.args[0]!r}")
