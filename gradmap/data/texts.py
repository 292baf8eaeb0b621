"""Texts from anywhere: what a SPEC names (gradmap.data.text_specs) becomes a list of documents."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gradmap.common.console import waiting
from gradmap.common.errors import UserError, first_line
from gradmap.common.reading import (
    is_text,
    kind_of,
    library_errors_refused,
    parse_record,
    read_lines,
    read_text,
)
from gradmap.data.text_specs import DiskSource, FileSource, HubSource, parse_source, preset_of

# A hub data set can be far larger than what is needed: reading stops here.
HUB_DOCUMENTS = 10_000


def read_texts(spec: str, seed: int) -> list[str]:
    """Returns the distinct non-empty documents of a SPEC in an order that `seed` fixes; of a
    preset, its calibration split.

    Raises UserError if the SPEC is malformed or its data is missing, damaged, empty or no text.
    """
    with waiting(f"Reading {spec}"):
        texts = _open_source(preset_of(spec).calibration, seed)
        stripped = dict.fromkeys(text.strip() for text in texts)
        documents = [document for document in stripped if document]
    if not documents:
        raise _no_text(spec)
    random.Random(seed).shuffle(documents)
    return documents


def read_joined(spec: str) -> str:
    """Returns the rows of a SPEC as one text, in their order and as they are; of a preset, its
    evaluation split.

    Raises UserError as `read_texts` does.
    """
    preset = preset_of(spec)
    with waiting(f"Reading {spec}"):
        text = preset.separator.join(islice(_open_source(preset.evaluation, None), preset.rows))
    if not text.strip():
        raise _no_text(spec)
    return text


def _no_text(spec: str) -> UserError:
    return UserError(f"Text source {spec} has no text; check its field or column.")


def _open_source(spec: str, seed: int | None) -> Iterator[str]:
    """seed: shuffles what is too large to be read whole; None reads it in its order."""
    match parse_source(spec):
        case FileSource() as source:
            return _read_file(source)
        case DiskSource(path, field):
            return _read_disk(path, field)
        case HubSource() as source:
            return _read_hub(source, seed)
    raise UserError(
        f"Text source {spec} is for the prompts of load tests alone; use file:, disk: or hub:."
    )


def _read_file(source: FileSource) -> Iterator[str]:
    if source.is_json_lines:
        return _read_jsonl(source.path, source.field)
    if source.path.suffix == ".parquet":
        return _read_parquet(source.path, source.field)
    return iter([_read_plain(source.path)])


def _read_plain(path: Path) -> str:
    text = read_text(path)
    # A text in UTF-16 without a mark would pass for one in UTF-8.
    if "\0" in text:
        raise UserError(
            f"{path} is no plain text: it has zero bytes; convert it to UTF-8, if it is text at "
            "all."
        )
    return text


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in read_lines(path):
        place = f"{path}, line {number}"
        row = parse_record(line)
        if not isinstance(row, dict):
            raise UserError(f"{place} is no JSON object with a field {field!r}.")
        yield from _text_at(row, field, place)


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    from pyarrow import parquet

    if not path.is_file():
        raise UserError(f"{path} is no file; check the path.")
    with library_errors_refused(f"{path} is no parquet file, or is damaged"):
        column = _column_of(field, parquet.read_schema(path).names)
        if column is None:
            raise UserError(f"{path} has no column {field!r}.")
        values = parquet.read_table(path, columns=[column])[column].to_pylist()
    return _texts_of_column(values, column, field, str(path))


def _read_disk(directory: Path, field: str) -> Iterator[str]:
    from datasets import DatasetDict, load_from_disk

    if not any((directory / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(
            f"{directory} is no directory written by datasets.save_to_disk; check the path."
        )
    with library_errors_refused(f"{directory} is damaged"):
        dataset = load_from_disk(str(directory))
    if isinstance(dataset, DatasetDict):
        raise UserError(
            f"{directory} holds the splits {', '.join(dataset)}; name one, as in "
            f"disk:{directory}/SPLIT:{field}."
        )
    column = _column_of(field, dataset.column_names)
    if column is None:
        raise UserError(f"The data set in {directory} has no column {field!r}.")
    return _texts_of_column(dataset[column], column, field, str(directory))


def _read_hub(source: HubSource, seed: int | None) -> Iterator[str]:
    from datasets import load_dataset

    try:
        stream = load_dataset(source.name, source.config, split=source.split, streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=HUB_DOCUMENTS)
        rows = list(islice(stream, HUB_DOCUMENTS))
    # A library that reads the hub's files of all kinds raises errors of all kinds.
    except Exception as error:
        raise UserError(
            f"Hub data set {source.name} could not be read ({first_line(error)}); use file: or "
            "disk: offline."
        ) from None
    for number, row in enumerate(rows, start=1):
        column = _column_of(source.field, row)
        if column is None:
            raise UserError(f"Hub data set {source.name} has no column {source.field!r}.")
        yield from _text_at(row, source.field, f"Hub data set {source.name}, row {number}")


def _column_of(field: str, names: Iterable[str]) -> str | None:
    """The column that has a field, which may be nested in it."""
    return next((name for name in (field, field.partition(".")[0]) if name in names), None)


def _texts_of_column(values: Iterable[Any], column: str, field: str, place: str) -> Iterator[str]:
    with library_errors_refused(f"{place} is damaged"):
        for number, value in enumerate(values, start=1):
            yield from _text_at({column: value}, field, f"{place}, row {number}")


def _text_at(row: dict[str, Any], field: str, place: str) -> Iterator[str]:
    """The text that a row has under a field, none where that is null. Raises UserError if it has
    something else."""
    try:
        text = value_at(row, field)
    except LookupError:
        raise UserError(f"{place} has no field {field!r}.") from None
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(f"{place}: the field {field!r} is {kind_of(text)}, and no text.")
    if not is_text(text):
        raise UserError(
            f"{place}: the field {field!r} holds half of a character (a lone surrogate)."
        )
    yield text


def value_at(row: dict[str, Any], field: str) -> Any:
    """The value under a field, by its whole name or nested; None also below what is null. Raises
    LookupError."""
    if field in row:
        return row[field]
    value: Any = row
    for key in field.split("."):
        match value:
            case dict():
                value = value[key]
            case list() if key.isdecimal():
                value = value[int(key)]
            case None:
                return None
            case _:
                raise LookupError
    return value
