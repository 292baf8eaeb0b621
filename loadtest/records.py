"""The seam between load test and report: one JSON line per request and one per block, raw measurements only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gradmap.errors import UserError

SCHEMA_VERSION = 2
RECORDS_FILE = "records.jsonl"
BLOCKS_FILE = "blocks.jsonl"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION


class RequestRecord(_Record):
    """What the client saw of one request. Times are seconds of this machine's monotonic clock.

    arm: dense, pruned or a candidate's name; pair: index of the block; load: loadtest.loads.Load.name. scheduled_s:
    when it was due, in an open loop. chunk_times_s / chunk_tokens: arrival of every chunk that carried new tokens, and
    the tokens so far at that chunk. completion_tokens: as the server's `usage` counts them. error: None if the request
    did all that was asked.
    """

    arm: str
    pair: int
    load: str
    request: str
    prompt_tokens: int
    requested_tokens: int
    scheduled_s: float | None = None
    sent_s: float
    ended_s: float
    chunk_times_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...]
    completion_tokens: int
    error: str | None = None


class BlockRecord(_Record):
    """What is known of one load of a block. client_cpu: the load generator's CPU time over the time it ran.

    server_tokens: by how much vLLM's own count of generated tokens rose; None where the server does not tell.
    """

    arm: str
    pair: int
    load: str
    client_cpu: float
    server_tokens: int | None


AnyRecord = TypeVar("AnyRecord", RequestRecord, BlockRecord)


def to_json_line(record: RequestRecord | BlockRecord) -> str:
    return record.model_dump_json() + "\n"


def read_records(path: Path) -> list[RequestRecord]:
    """Reads a records file; raises UserError at a line that is no record."""
    return _read(path, RequestRecord)


def read_blocks(path: Path) -> list[BlockRecord]:
    """The same for a file of blocks."""
    return _read(path, BlockRecord)


def _read(path: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
    records = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            records.append(kind.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}, line {number} is no {kind.__name__}: {place}: {first['msg']}.") from None
    return records


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path.") from None
