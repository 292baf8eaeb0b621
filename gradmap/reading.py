"""Reads files that others wrote, as text, JSON or YAML: what is wrong with one is said in one sentence."""

from __future__ import annotations

import codecs
import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gradmap.errors import UserError

BYTE_ORDER_MARK = "\ufeff"
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Model = TypeVar("Model", bound=BaseModel)


def read_text(path: Path) -> str:
    """The contents of a file in UTF-8, without a byte order mark.

    Raises UserError if it is missing, no regular file, not to be read, or in another encoding.
    """
    try:
        contents = path.read_bytes()
        if contents.startswith(UTF_16_MARKS):
            raise UserError(f"{path} is in UTF-16; convert it to UTF-8.")
        return contents.decode().removeprefix(BYTE_ORDER_MARK)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory where a file is expected; check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8 (byte {error.start} does not belong); convert it to UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {os.strerror(error.errno or 0)}.") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError as `read_text` does, and if it is not JSON or a number not finite."""
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError as `read_json` does, and if it holds another kind of value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object, but {_kind_of(value)}; check that it is the right file.")
    return value


def parse_json(text: str, what: str) -> Any:
    """The value of JSON text, which `what` names in errors.

    Raises UserError where `json` raises, and on NaN, infinities and numbers beyond the range of a float.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except RecursionError:
        raise UserError(f"{what} is not usable JSON (nested too deeply); check that it is the right file.") from None
    except ValueError as error:
        raise UserError(f"{what} is not valid JSON ({error}); it may be truncated, write it again.") from None


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises UserError as `read_text` does, if it is not YAML, or if a key occurs twice."""
    text = read_text(path)
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is not usable YAML: {error}.") from None


def checked(kind: type[Model], value: Any, path: Path) -> Model:
    """The value read from `path`, as a pydantic model. Raises UserError that names the first key at fault."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}.") from None


def first_problem(error: ValidationError) -> str:
    """KEY: what is wrong with its value, of the first of several."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{place}: this key is not known; check its spelling"
    return f"{place}: {first['msg']}" if place else str(first["msg"])


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML in which a key that occurs twice is an error, not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]  # before the merge keys (<<) are filled in, which may repeat
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        twice = next((key for key in keys if isinstance(key, str) and keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} occurs twice", node.start_mark)
        return mapping


def _kind_of(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond the range of numbers")
    return number
