"""Options of the command line, each declared once: as a field of a model, which recipes nest
too."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import annotated_types
import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gradmap.common.errors import UserError
from gradmap.common.reading import Strict

Command = Callable[..., Any]
NUMBERS: dict[Any, str] = {int: "whole numbers", float: "numbers"}
Options = TypeVar("Options", bound=Strict)


def finite_numbers(command: Command) -> Command:
    """The command, which refuses `nan` and `inf`: both are numbers to whoever parses them, and pass
    every bound."""

    @wraps(command)
    def run(**options: Any) -> Any:
        for name, value in options.items():
            values = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in values):
                raise UserError(f"{flag_of(name)} is no finite number; give one.")
        return command(**options)

    return run


def flag_of(name: str) -> str:
    """`top_z` -> `--top-z`."""
    return f"--{name.replace('_', '-')}"


def takes(kind: type[Strict]) -> Callable[[Command], Command]:
    """Decorates a command whose first parameter is such a model: the command line has an option for
    each of its fields, with the field's description, bounds and default, behind the command's own
    required ones."""

    def decorate(command: Command) -> Command:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        made = [_parameter(name, field) for name, field in kind.model_fields.items()]

        @wraps(command)
        def run(**given: Any) -> Any:
            values = {name: given.pop(name) for name in kind.model_fields}
            return command(read_options(kind, values), **given)

        required = [parameter for parameter in own if parameter.default is parameter.empty]
        others = [parameter for parameter in own if parameter not in required]
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in (*required, *made, *others)
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def read_options(kind: type[Options], values: dict[str, Any]) -> Options:
    """The model of what the command line gave, where a list that is not given is None. Raises
    UserError if a value is not what its field takes."""
    given: dict[str, Any] = {}
    for name, value in values.items():
        item = _item(kind.model_fields[name])
        if item is None or value is not None:
            given[name] = _split(name, value, item) if item in NUMBERS else value
    try:
        return kind(**given)
    except ValidationError as error:
        raise UserError(_first_problem(error, values)) from None


def _first_problem(error: ValidationError, values: dict[str, Any]) -> str:
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{reason}."
    name = str(first["loc"][0])
    return f"{flag_of(name)} is {values[name]}: {reason[0].lower()}{reason[1:]}."


def _split(name: str, values: list[str], item: Any) -> list[float]:
    """Numbers, which may stand in one option with commas between them, or each in its own."""
    try:
        return [item(number) for value in values for number in value.split(",")]
    except ValueError:
        raise UserError(
            f"{flag_of(name)} is {' '.join(values)}; give {NUMBERS[item]} with commas between "
            "them, such as 21,22."
        ) from None


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    is_list = _item(field) is not None
    kind: Any = (list[str] | None) if is_list else field.annotation
    bounds = {
        key: getattr(bound, attribute)
        for bound in field.metadata
        for key, attribute, of in (
            ("min", "ge", annotated_types.Ge),
            ("max", "le", annotated_types.Le),
        )
        if isinstance(bound, of)
    }
    flags = [flag_of(name)] if bool in _kinds(field) else []
    option = typer.Option(*flags, help=field.description, **bounds)
    default = None if is_list else field.get_default(call_default_factory=True)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    """The types that a field may have, None aside."""
    annotation = field.annotation
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,)
    return tuple(kind for kind in get_args(annotation) if kind is not NoneType)


def _item(field: FieldInfo) -> Any:
    """What a list has items of; None of what is no list."""
    return next((get_args(kind)[0] for kind in _kinds(field) if get_origin(kind) is list), None)
