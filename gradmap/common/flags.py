"""How options are written on a command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo

from gradmap.common.reading import Strict


def flag_of(name: str) -> str:
    """The flag of a field's name: `top_z` -> `--top-z`."""
    return f"--{name.replace('_', '-')}"


def opposite_of(name: str) -> str:
    """The flag that turns off a switch which is on where nothing is said: `check_vllm` ->
    `--no-check-vllm`."""
    return flag_of(f"no_{name}")


def option_of(name: str, field: FieldInfo) -> str:
    """The option of a model's field: of its name, or what the field itself says (`flag`)."""
    return said_of(field, "flag") or flag_of(name)


def said_of(field: FieldInfo, key: str) -> str | None:
    """What a field says of itself beside its type and description (its `json_schema_extra`)."""
    extra = field.json_schema_extra
    said = extra.get(key) if isinstance(extra, dict) else None
    return None if said is None else str(said)


def flags_of(options: Strict) -> list[str]:
    """The options of a command that stand for what is set in its model."""
    flags: list[str] = []
    for name, value in options.model_dump(exclude_unset=True, mode="json").items():
        field = type(options).model_fields[name]
        is_off = value is False and field.default is True
        flags += [opposite_of(name)] if is_off else _written(option_of(name, field), value)
    return flags


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them.

    {"one_shot": True, "remove": 8, "limit": None, "x": [1, 2], "y": {"a": "b", "c": "c"}} ->
    --one-shot --remove=8 --x=1 --x=2 --y=a=b --y=c.
    """
    flags: list[str] = []
    for name, value in values.items():
        flags += _written(flag_of(name), value)
    return flags


def _written(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option] if value else []
    if isinstance(value, dict):
        named = {key: key if key == item else f"{key}={item}" for key, item in value.items()}
        return [f"{option}={text}" for text in named.values()]
    if isinstance(value, list):
        return [f"{option}={item}" for item in value]
    return [] if value is None else [f"{option}={value}"]
