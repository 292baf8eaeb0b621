"""Prompts in files of records: conversations in ShareGPT's format, a JSON list or one object a
line, and JSON lines."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gradmap.common.console import say
from gradmap.common.errors import UserError
from gradmap.data.conversations import read_records, turns_of
from gradmap.data.text_specs import SHAREGPT_FIELD
from gradmap.data.texts import value_at

ASKING = "user"
# Turns that are no part of the exchange.
ASIDE = ("system",)

# A prompt's text, and the answer that was given to it, where one is known.
Exchange = tuple[str, str | None]


@dataclass(frozen=True)
class RecordCount:
    """records: that a file has, skipped: of them, those of no use."""

    records: int
    skipped: int


def read_conversations(path: Path, seed: int) -> tuple[list[Exchange], RecordCount]:
    """First question and first answer of every conversation in a file; else as `_read_usable`."""
    return _read_usable(
        path, first_exchange, "conversation that begins with a question and an answer", seed
    )


def read_documents(path: Path, field: str, seed: int) -> tuple[list[Exchange], RecordCount]:
    """What the records of a file have under a field, if it is text; else as `_read_usable`."""
    return _read_usable(path, partial(_document, field), f"text in a field {field!r}", seed)


def first_exchange(record: Any) -> tuple[str, str] | None:
    """The question and the answer that a conversation begins with, system prompts aside; None if it
    does not."""
    turns = turns_of(record.get(SHAREGPT_FIELD)) if isinstance(record, dict) else None
    exchange = [turn for turn in turns or () if turn.role not in ASIDE][:2]
    if [turn.role == ASKING for turn in exchange] != [True, False]:
        return None
    question, answer = (_whole(turn.content) for turn in exchange)
    return (question, answer) if question and answer else None


def _document(field: str, record: Any) -> Exchange | None:
    try:
        text = value_at(record, field) if isinstance(record, dict) else None
    except LookupError:
        return None
    whole = _whole(text) if isinstance(text, str) else ""
    return (whole, None) if whole else None


def _read_usable(
    path: Path, usable: Callable[[Any], Exchange | None], wanted: str, seed: int
) -> tuple[list[Exchange], RecordCount]:
    """What is of use in a file, each once, in an order that `seed` fixes. Says how many records are
    not.

    Raises UserError if the file cannot be read, or nothing in it is of use.
    """
    records = read_records(path)
    found = [exchange for exchange in map(usable, records) if exchange is not None]
    if not found:
        raise UserError(f"{path} has no {wanted} ({len(records)} records).")
    count = RecordCount(len(records), len(records) - len(found))
    if count.skipped:
        say(
            f"{count.skipped} of {count.records} records of {path} are skipped: they have no "
            f"{wanted}."
        )
    exchanges = list(dict.fromkeys(found))
    random.Random(seed).shuffle(exchanges)
    return exchanges, count


def _whole(text: str) -> str:
    """Halves of characters, which JSON may hold and no tokeniser takes, become the sign for what
    cannot be shown."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
