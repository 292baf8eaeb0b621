"""Reads files that others wrote, as text or JSON: what is wrong with one is said in one
sentence."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from gradmap.common.errors import UserError, first_line

BYTE_ORDER_MARK = "\ufeff"
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Model = TypeVar("Model")
Result = TypeVar("Result", bound=BaseModel)


class Strict(BaseModel):
    """Part of a file format of ours: unknown keys are refused, values do not change, and numbers
    are finite: a comparison with NaN is false, and slips through every check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# What libraries raise over data that is not what they expect: few have an error of their own for
# it.
MALFORMED = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def read_text(path: Path) -> str:
    """The contents of a file in UTF-8, without a byte order mark.

    Raises UserError if it is missing, no regular file, not to be read, or in another encoding.
    """
    try:
        contents = path.read_bytes()
        _refuse_utf_16(path, contents)
        return contents.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8 (byte {error.start} does not belong); convert it to "
            "UTF-8."
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file in UTF-8 with their numbers, but for blank ones; unpacked if its name
    ends in .gz.

    Raises UserError as `read_text` does, and if an archive is damaged.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    _refuse_utf_16(path, line)
                text = line.decode()
                text = text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}, is not text in UTF-8 (byte {error.start} does not belong); "
            "convert it to UTF-8."
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(
            f"{path} is no gzip archive, or is cut short or damaged; fetch it again."
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError as `read_text` does, and if it is not JSON or a
    number not finite."""
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError as `read_json` does, and if it holds another kind
    of value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds no JSON object, but {kind_of(value)}; check that it is the right file."
        )
    return value


def parse_json(text: str, what: str) -> Any:
    """The value of JSON text, which `what` names in errors.

    Raises UserError where `json` raises, and on NaN, infinities and numbers beyond the range of a
    float.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except RecursionError:
        raise UserError(
            f"{what} is not usable JSON (nested too deeply); check that it is the right file."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{what} is not valid JSON ({error}); it may be truncated, write it again."
        ) from None


def parse_record(text: str) -> Any:
    """The value of a record of data, None where it has none: what is beside the data in use may be
    NaN."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def checked(kind: type[Model], value: Any, path: Path) -> Model:
    """The value read from `path`, as a pydantic model, a dataclass, or a list of them.

    Raises UserError that names the first key at fault.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}.") from None


def checked_result(kind: type[Result], contents: Any, path: Path, cure: str) -> Result:
    """The contents of a file of ours as the pydantic model that wrote them: every value is of its
    kind as it is, and not converted. cure: how the file is made again.

    Raises UserError that names the first key at fault, and the cure.
    """
    # As JSON: strictly, Python's dictionaries and lists are no dataclasses and tuples.
    try:
        return kind.model_validate_json(json.dumps(contents), strict=True)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error, cure)}.") from None


@contextmanager
def library_errors_refused(what: str) -> Iterator[None]:
    """Turns what a library raises over malformed data into a UserError, `what` and its first line;
    not what others may raise, so for a library's own work alone."""
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{what} ({first_line(error)}).") from None


def is_text(value: str) -> bool:
    """Whether a string can be written: JSON may hold halves of characters, which no encoding
    has."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: Any) -> str:
    """The kind of a value from JSON, for a sentence: "a list"."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def first_problem(error: ValidationError, cure: str | None = None) -> str:
    """KEY: what is wrong with its value, of the first of several; and the cure, if it is known."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    problem = f"{place}: {first['msg']}" if place else str(first["msg"])
    if first["type"] == "extra_forbidden":
        if cure is None:
            return f"{place}: this key is not known; check its spelling"
        problem = f"{place}: this key is not known"
    return problem if cure is None else f"{problem}; {cure}"


def _refuse_utf_16(path: Path, contents: bytes) -> None:
    if contents.startswith(UTF_16_MARKS):
        raise UserError(f"{path} is in UTF-16; convert it to UTF-8.")


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist; check the path.")
    if isinstance(error, IsADirectoryError):
        return UserError(f"{path} is a directory where a file is expected; check the path.")
    return UserError(f"{path} cannot be read: {os.strerror(error.errno or 0)}.")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond the range of numbers")
    return number
