"""The rows of a source, each with the place that errors name: whatever kind of file or data set it
is, and however large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gradmap.common.errors import UserError, first_line
from gradmap.common.reading import library_errors_refused, parse_record, read_lines, read_text
from gradmap.data.conversations import read_records
from gradmap.data.text_specs import Conversations, DiskSource, FileSource, HubSource, Source

# So much of a hub data set is read unless all is asked for.
HUB_DOCUMENTS = 10_000
# Of a parquet file, so many are in memory at once.
PARQUET_ROWS = 1024

# At least the field that is asked for, with what it is nested in; and where that was read.
Row = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class HubOrder:
    """Which rows of a hub data set, which can be far larger than what is needed. seed: shuffles the
    files that it is in, and rows among `buffer`; None for its own order. limit: the first of them;
    None for all."""

    seed: int | None
    buffer: int = HUB_DOCUMENTS
    limit: int | None = HUB_DOCUMENTS


def read_rows(source: Source, hub_order: HubOrder) -> Iterator[Row]:
    """Yields the rows of a source in their order, or a hub data set's in `hub_order`.

    Raises UserError if it is missing, damaged or of another kind, when it comes to that.
    """
    match source:
        case FileSource(path, field) if source.is_json_lines:
            return _read_jsonl(path, field)
        case FileSource(path, field) if path.suffix == ".parquet":
            return _read_parquet(path, field)
        case FileSource(path, field):
            return iter([({field: _read_plain(path)}, str(path))])
        case DiskSource(path, field):
            return _read_disk(path, field)
        case Conversations(path, field):
            return _read_conversations(path, field)
        case HubSource():
            return _read_hub(source, hub_order)


def _read_plain(path: Path) -> str:
    text = read_text(path)
    # A text in UTF-16 without a mark would pass for one in UTF-8.
    if "\0" in text:
        raise UserError(
            f"{path} is no plain text: it has zero bytes; convert it to UTF-8, if it is text at "
            "all."
        )
    return text


def _read_jsonl(path: Path, field: str) -> Iterator[Row]:
    for number, line in read_lines(path):
        yield _object(parse_record(line), field, f"{path}, line {number}")


def _read_conversations(path: Path, field: str) -> Iterator[Row]:
    for number, record in enumerate(read_records(path), start=1):
        yield _object(record, field, f"{path}, record {number}")


def _object(record: Any, field: str, place: str) -> Row:
    if not isinstance(record, dict):
        raise UserError(f"{place} is no JSON object with a field {field!r}.")
    return record, place


def _read_parquet(path: Path, field: str) -> Iterator[Row]:
    from pyarrow import parquet

    if not path.is_file():
        raise UserError(f"{path} is no file; check the path.")
    with (
        library_errors_refused(f"{path} is no parquet file, or is damaged"),
        parquet.ParquetFile(path) as file,
    ):
        column = _column_of(field, file.schema_arrow.names)
        if column is None:
            raise UserError(f"{path} has no column {field!r}.")
        batches = file.iter_batches(PARQUET_ROWS, columns=[column])
        values = (value for batch in batches for value in batch[column].to_pylist())
        yield from _rows_of_column(values, column, str(path))


def _read_disk(directory: Path, field: str) -> Iterator[Row]:
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
    return _rows_of_column(dataset[column], column, str(directory))


def _rows_of_column(values: Iterable[Any], column: str, place: str) -> Iterator[Row]:
    with library_errors_refused(f"{place} is damaged"):
        for number, value in enumerate(values, start=1):
            yield {column: value}, f"{place}, row {number}"


def _read_hub(source: HubSource, order: HubOrder) -> Iterator[Row]:
    for number, row in enumerate(_hub_stream(source, order), start=1):
        if _column_of(source.field, row) is None:
            raise UserError(f"Hub data set {source.name} has no column {source.field!r}.")
        yield row, f"Hub data set {source.name}, row {number}"


def _hub_stream(source: HubSource, order: HubOrder) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        stream = load_dataset(source.name, source.config, split=source.split, streaming=True)
        if order.seed is not None:
            stream = stream.shuffle(seed=order.seed, buffer_size=order.buffer)
        yield from islice(stream, order.limit)
    # A library that reads the hub's files of all kinds raises errors of all kinds.
    except Exception as error:
        raise UserError(
            f"Hub data set {source.name} could not be read ({first_line(error)}); use file: or "
            "disk: offline."
        ) from None


def _column_of(field: str, names: Iterable[str]) -> str | None:
    """The column that has a field, which may be nested in it."""
    return next((name for name in (field, field.partition(".")[0]) if name in names), None)
