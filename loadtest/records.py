"""The seam between load test and report: one JSON line per request, raw timings only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from gradmap.errors import UserError

SCHEMA_VERSION = 1


class RequestRecord(BaseModel):
    """What the client saw of one request. Times are seconds of this machine's monotonic clock.

    arm: dense or pruned; pair: index of the block; concurrency: requests in flight in that block.
    chunk_times_s / chunk_tokens: arrival of every chunk that carried new tokens, and the tokens so far at that chunk.
    completion_tokens: as the server's `usage` counts them. error: None if the request did all that was asked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    arm: str
    pair: int
    concurrency: int
    request: str
    prompt_tokens: int
    requested_tokens: int
    sent_s: float
    ended_s: float
    chunk_times_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...]
    completion_tokens: int
    error: str | None = None


def to_json_line(record: RequestRecord) -> str:
    return record.model_dump_json() + "\n"


def read_records(path: Path) -> list[RequestRecord]:
    """Reads a records file; raises UserError at a line that is no record."""
    records = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            records.append(RequestRecord.model_validate_json(line))
        except ValidationError as error:
            raise UserError(f"{path}, line {number} is no request record: {error.errors()[0]['msg']}.") from None
    return records


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path.") from None
