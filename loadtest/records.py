"""The seam between load test and report: one JSON line per request, per block and per sample of the
machine's use.

Raw measurements only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from gradmap.common.errors import UserError
from gradmap.common.files import append_text, atomic_file
from gradmap.common.reading import Strict, first_problem, read_text

SCHEMA_VERSION = 3
RECORDS_FILE = "records.jsonl"
BLOCKS_FILE = "blocks.jsonl"
RESOURCES_FILE = "resources.jsonl"
# What follows from them.
REPORT_FILE = "report.json"
REPORT_PAGE, REPORT_SUMMARY, REPORT_CASES = "report.html", "report.md", "junit.xml"
REPORTS = (REPORT_FILE, REPORT_PAGE, REPORT_SUMMARY, REPORT_CASES)


Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0)]


class _Record(Strict):
    schema_version: int = SCHEMA_VERSION


class Cell(NamedTuple):
    """Where a measurement belongs: a load of a block. load: its name (loadtest.loads).

    pair: index of the block; below zero, of what is no pair: the warm-up, or the search for the
    highest rate.
    """

    arm: str
    pair: int
    load: str

    def __str__(self) -> str:
        """For a sentence; pairs are counted from 1."""
        return f"{self.arm}, pair {self.pair + 1}, {self.load}"


class _Placed(_Record):
    arm: str
    pair: int
    load: str

    @property
    def cell(self) -> Cell:
        return Cell(self.arm, self.pair, self.load)


class RequestRecord(_Placed):
    """What the client saw of one request. Times are seconds of this machine's monotonic clock.

    arm: dense, pruned or a candidate's name; pair: index of the block; load: its name
    (loadtest.loads). scheduled_s: when it was due, in an open loop. chunk_times_s / chunk_tokens:
    arrival of every chunk that carried new tokens, and the tokens so far at that chunk.
    completion_tokens: as the server's `usage` counts them. error: None if the request did all that
    was asked.
    """

    request: str
    prompt_tokens: Count
    requested_tokens: Count
    scheduled_s: float | None = None
    sent_s: float
    ended_s: float
    chunk_times_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...]
    completion_tokens: Count
    error: str | None = None

    @model_validator(mode="after")
    def _could_have_happened(self) -> Self:
        scheduled_s = self.sent_s if self.scheduled_s is None else self.scheduled_s
        times = (scheduled_s, self.sent_s, *self.chunk_times_s, self.ended_s)
        if any(later < earlier for earlier, later in pairwise(times)):
            raise ValueError("its times are not in their order")
        if any(later <= earlier for earlier, later in pairwise((0, *self.chunk_tokens))):
            raise ValueError("its chunks bring no tokens")
        if len(self.chunk_times_s) != len(self.chunk_tokens):
            raise ValueError("it has another number of chunks than of their times")
        if self.error is None and (
            self.completion_tokens != self.requested_tokens or not self.chunk_tokens
        ):
            raise ValueError("it has no error, and yet not the tokens that were asked for")
        if self.chunk_tokens and self.chunk_tokens[-1] != self.completion_tokens:
            raise ValueError("its last chunk has another count of tokens than it has")
        return self


class BlockRecord(_Placed):
    """What is known of one load of a block. client_cpu: the load generator's CPU time over the time
    it ran, of its busiest process.

    server_tokens: by how much vLLM's own count of generated tokens rose; None where the server does
    not tell.
    """

    client_cpu: Share
    server_tokens: int | None


class GpuSample(Strict):
    """utilisation: share of the time in which it computed; None for what the card does not tell."""

    utilisation: float | None
    memory_bytes: int | None
    power_w: float | None
    clock_mhz: float | None
    throttled: bool | None


class ResourceSample(_Placed):
    """The whole machine at one moment of a block. cpu: share of all cores since the sample
    before."""

    time_s: float
    cpu: float
    memory_bytes: int
    gpus: tuple[GpuSample, ...]


@dataclass(frozen=True)
class Measurements:
    """All that was measured; every number of a report follows from it."""

    requests: tuple[RequestRecord, ...] = ()
    blocks: tuple[BlockRecord, ...] = ()
    resources: tuple[ResourceSample, ...] = ()

    def __add__(self, other: Measurements) -> Measurements:
        return Measurements(
            self.requests + other.requests,
            self.blocks + other.blocks,
            self.resources + other.resources,
        )


AnyRecord = TypeVar("AnyRecord", RequestRecord, BlockRecord, ResourceSample)


def to_json_line(record: _Record) -> str:
    """In ASCII, so that other readers, too, end no line at a U+2028 inside of a string."""
    return json.dumps(record.model_dump(mode="json"), allow_nan=False) + "\n"


def start_files(directory: Path) -> None:
    """Empties the files of an earlier test, after its reports, which would outlive what they are
    of."""
    for name in REPORTS:
        (directory / name).unlink(missing_ok=True)
    for name in _files(Measurements()):
        (directory / name).with_suffix(".parquet").unlink(missing_ok=True)
        (directory / name).write_text("")


def append_measurements(directory: Path, measured: Measurements) -> None:
    for name, records in _files(measured).items():
        append_text(directory / name, "".join(map(to_json_line, records)))


def read_measurements(directory: Path) -> Measurements:
    """Raises UserError if a file is missing, or at a line that is no record."""
    return Measurements(
        tuple(_read(directory / RECORDS_FILE, RequestRecord)),
        tuple(_read(directory / BLOCKS_FILE, BlockRecord)),
        tuple(_read(directory / RESOURCES_FILE, ResourceSample)),
    )


def write_parquet(directory: Path, measured: Measurements) -> None:
    """Writes the raw files as Parquet too, one beside each; lists stay lists."""
    import pyarrow
    from pyarrow import parquet

    for name, records in _files(measured).items():
        table = pyarrow.Table.from_pylist([record.model_dump() for record in records])
        with atomic_file((directory / name).with_suffix(".parquet")) as partial:
            parquet.write_table(table, partial)


def _files(measured: Measurements) -> dict[str, Sequence[_Record]]:
    return {
        RECORDS_FILE: measured.requests,
        BLOCKS_FILE: measured.blocks,
        RESOURCES_FILE: measured.resources,
    }


def _read(path: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
    records = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            records.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise UserError(
                f"{path}, line {number} is no {kind.__name__}: {first_problem(error)}."
            ) from None
    return records


def _lines(path: Path) -> list[str]:
    """A line ends with a line feed alone: str.splitlines would end it inside of strings too, at
    U+2028 or U+0085."""
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []
