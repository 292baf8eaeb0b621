"""Options of the command line, each declared once: as a field of a model, which recipes nest
too."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import wraps
from itertools import chain
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import annotated_types
import typer
from pydantic import StringConstraints, ValidationError
from pydantic.fields import FieldInfo

from gradmap.common.errors import UserError
from gradmap.common.flags import flag_of, opposite_of, option_of, said_of
from gradmap.common.reading import Strict

Command = Callable[..., Any]
NUMBERS: dict[Any, str] = {int: "whole numbers", float: "numbers"}
# Of something that has names without commas: of several, all may stand in one option.
Name = Annotated[str, StringConstraints(pattern="^[^,]+$")]
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


def takes(*kinds: type[Strict]) -> Callable[[Command], Command]:
    """Decorates a command whose first parameters are such models: the command line has an option
    for each of their fields, with the field's description, bounds and default, behind the command's
    own required ones.

    A list may be given by its option several times; of numbers and names, several may stand in one
    with commas between them.
    """

    def decorate(command: Command) -> Command:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(kinds) :]
        fields = chain.from_iterable(kind.model_fields.items() for kind in kinds)
        made = [_parameter(name, field) for name, field in fields]

        @wraps(command)
        def run(**given: Any) -> Any:
            models = []
            for kind in kinds:
                values = {name: given.pop(name) for name in kind.model_fields}
                models.append(read_options(kind, values))
            return command(*models, **given)

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
        field = kind.model_fields[name]
        if value is not None or not _is_several(field):
            given[name] = _split(name, value, field)
    return checked_options(kind, given)


def checked_options(kind: type[Options], values: dict[str, Any]) -> Options:
    """The model of these values. Raises UserError if one is not what its field takes, or has no
    field."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError(_first_problem(kind, error, values)) from None


def _first_problem(kind: type[Strict], error: ValidationError, values: dict[str, Any]) -> str:
    """The sentence for the first field at fault, with the cure that it names, or the reason."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{reason}."
    name = str(first["loc"][0])
    if name not in values or name not in kind.model_fields:
        return f"{name}: {reason[0].lower()}{reason[1:]}."
    cure = said_of(kind.model_fields[name], "cure") or reason[0].lower() + reason[1:]
    return f"{flag_of(name)} is {values[name]}; {cure}."


def _split(name: str, value: Any, field: FieldInfo) -> Any:
    """The items of a list of numbers or names; any other value as it is."""
    item = _item(field)
    if item is None:
        return value
    parts = [part.strip() for text in value for part in text.split(",")]
    if item is str:
        return [part for part in parts if part]
    try:
        return [item(part) for part in parts]
    except ValueError:
        raise UserError(
            f"{flag_of(name)} is {' '.join(value)}; give {NUMBERS[item]} with commas between "
            "them, such as 21,22."
        ) from None


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    several = _is_several(field)
    kind: Any = (list[str] | None) if several else _unbounded(field.annotation)
    option = typer.Option(*_flags(name, field), help=field.description, **_bounds(field))
    default: Any
    if field.is_required():
        kind, default = (list[str] if several else kind), inspect.Parameter.empty
    else:
        default = None if several else field.get_default(call_default_factory=True)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _bounds(field: FieldInfo) -> dict[str, Any]:
    """A field's bounds, by typer's names for them."""
    bounds: dict[str, Any] = {}
    for bound in field.metadata:
        if isinstance(bound, annotated_types.Ge):
            bounds["min"] = bound.ge
        if isinstance(bound, annotated_types.Le):
            bounds["max"] = bound.le
    return bounds


def _flags(name: str, field: FieldInfo) -> list[str]:
    """The flags of a switch, which may have an opposite, or of an option that is called otherwise
    than its field; typer finds all others by the name."""
    flag = option_of(name, field)
    if bool in _kinds(field):
        return [flag] if field.default is False else [f"{flag}/{opposite_of(name)}"]
    return [] if flag == flag_of(name) else [flag]


def _unbounded(annotation: Any) -> Any:
    """The type without what `read_options` checks, for its sentences are clearer than typer's."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return Union[tuple(_unbounded(kind) for kind in get_args(annotation))]  # noqa: UP007
    return annotation


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    """The types that a field may have, None aside."""
    annotation = field.annotation
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,)
    return tuple(kind for kind in get_args(annotation) if kind is not NoneType)


def _is_several(field: FieldInfo) -> bool:
    """Whether a field's option may be given several times."""
    return any(get_origin(kind) in (list, dict) for kind in _kinds(field))


def _item(field: FieldInfo) -> Any:
    """The items' type of a list that may be written with commas: int, float, or str for names and
    for what is written as one; else None."""
    for kind in _kinds(field):
        if get_origin(kind) is list:
            item = get_args(kind)[0]
            if item is Name or hasattr(item, "parse"):  # which reads its own text
                return str
            plain = get_args(item)[0] if get_origin(item) is Annotated else item
            return plain if plain in NUMBERS else None
    return None
