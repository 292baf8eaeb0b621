"""Recorded conversations in ShareGPT's format: a JSON list of objects with `conversations`, or one object a line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from gradmap.console import say
from gradmap.errors import UserError
from gradmap.reading import read_text

ASKING = ("human", "user")
# Turns that are no part of the exchange.
ASIDE = ("system",)


def read_conversations(path: Path, seed: int) -> list[tuple[str, str]]:
    """First question and first answer of every conversation in a file, shuffled. Says how many records have none.

    Raises UserError if the file is no such list, or none of its records has both.
    """
    records = _read_records(path)
    pairs = [pair for pair in map(first_exchange, records) if pair is not None]
    if not pairs:
        raise UserError(
            f"{path} has no conversation that begins with a question and an answer ({len(records)} records)."
        )
    if len(pairs) < len(records):
        skipped = f"{len(records) - len(pairs)} of {len(records)} records of {path} are skipped"
        say(f"{skipped}: they are no conversations that begin with a question and an answer.")
    random.Random(seed).shuffle(pairs)
    return pairs


def first_exchange(record: Any) -> tuple[str, str] | None:
    """The question and the answer that a conversation begins with, system prompts aside; None if it does not."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    exchange = [turn for turn in turns if turn.get("from") not in ASIDE][:2]
    if [turn.get("from") in ASKING for turn in exchange] != [True, False]:
        return None
    texts = [_whole(turn["value"]) for turn in exchange if isinstance(turn.get("value"), str)]
    return (texts[0], texts[1]) if len(texts) == 2 and all(texts) else None


def _read_records(path: Path) -> list[Any]:
    """One that cannot be read is None; of a list, that cannot be told."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return [_parse(line) for line in text.split("\n") if line.strip()]
    records = _parse(text)
    if not isinstance(records, list):
        raise UserError(f"{path} is not in ShareGPT's format: its list of objects is no valid JSON; is it cut short?")
    return records


def _parse(text: str) -> Any:
    try:
        return json.loads(text)  # not as strictly as a file of settings: what is beside the text may be NaN
    except (ValueError, RecursionError):
        return None


def _whole(text: str) -> str:
    """Halves of characters, which JSON may hold and no tokeniser takes, become the sign for what cannot be shown."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
