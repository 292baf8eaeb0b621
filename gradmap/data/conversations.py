"""Conversations as data sets have them: lists of turns in OpenAI's form or ShareGPT's, and files of
records."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from gradmap.common.errors import UserError
from gradmap.common.reading import parse_record, read_lines

# What ShareGPT's records call the two sides.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


class Turn(NamedTuple):
    """role: system, user or assistant, or what else the data calls it."""

    role: str
    content: str


def turns_of(value: Any) -> list[Turn] | None:
    """The turns of a conversation: objects with role and content, or with from and value. None if
    it is none."""
    if not isinstance(value, list) or not value:
        return None
    turns = [_turn(one) for one in value]
    found = [turn for turn in turns if turn is not None]
    return found if len(found) == len(turns) else None


def _turn(value: Any) -> Turn | None:
    if not isinstance(value, dict):
        return None
    role, content = value.get("role"), value.get("content")
    if role is None:
        role, content = value.get("from"), value.get("value")
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return Turn(ROLES.get(role, role), content)


def read_records(path: Path) -> list[Any]:
    """The records of a file: a JSON list, or one object a line. One that cannot be read is None; of
    a list, that cannot be told.

    Raises UserError if the file cannot be read, or begins as a list and is none.
    """
    lines = [line for _, line in read_lines(path)]
    if not _begins_list(lines):
        return [parse_record(line) for line in lines]
    records = parse_record("".join(lines))
    if not isinstance(records, list):
        raise UserError(
            f"{path} is no list of records: it begins as one, and is no valid JSON; is it cut "
            "short?"
        )
    return records


def _begins_list(lines: list[str]) -> bool:
    """Whether all lines are one list; a list that ends in the first of several lines is a
    record."""
    begun = bool(lines) and lines[0].lstrip().startswith("[")
    return begun and (len(lines) == 1 or parse_record(lines[0]) is None)
