"""Texts from anywhere: what a SPEC names (gradmap.data.text_specs) becomes documents."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from gradmap.common.console import waiting
from gradmap.common.errors import UserError
from gradmap.common.reading import is_text, kind_of
from gradmap.data.rows import HubOrder, read_rows
from gradmap.data.text_specs import Conversations, parse_source, preset_of

# What makes documents of a row, its field, and the place to name in errors: one, or none.
DocumentsAt = Callable[[dict[str, Any], str, str], Iterator[str]]


def read_texts(spec: str, seed: int) -> list[str]:
    """Returns the distinct non-empty documents of a SPEC in an order that `seed` fixes; of a
    preset, its calibration split.

    Raises UserError if the SPEC is malformed or its data is missing, damaged, empty or no text.
    """
    with waiting(f"Reading {spec}"):
        texts = _texts_of(preset_of(spec).calibration, HubOrder(seed))
        stripped = dict.fromkeys(text.strip() for text in texts)
        documents = [document for document in stripped if document]
    if not documents:
        raise no_text(spec)
    random.Random(seed).shuffle(documents)
    return documents


def read_joined(spec: str) -> str:
    """Returns the rows of a SPEC as one text, in their order and as they are; of a preset, its
    evaluation split.

    Raises UserError as `read_texts` does.
    """
    preset = preset_of(spec)
    with waiting(f"Reading {spec}"):
        rows = _texts_of(preset.evaluation, HubOrder(None))
        text = preset.separator.join(islice(rows, preset.rows))
    if not text.strip():
        raise no_text(spec)
    return text


def stream_texts(spec: str, seed: int, documents_at: DocumentsAt) -> Iterator[str]:
    """Yields the non-empty documents of a SPEC in its own order, however many there are; of a
    preset, its calibration split. seed: shuffles the files that a hub data set is in.

    Raises UserError as `read_texts` does, when it comes to what cannot be read.
    """
    source = parse_source(spec)
    for row, place in read_rows(source, HubOrder(seed, buffer=1, limit=None)):
        for document in documents_at(row, source.field, place):
            if document.strip():
                yield document


def no_text(spec: str) -> UserError:
    return UserError(f"Text source {spec} has no text; check its field or column.")


def _texts_of(spec: str, order: HubOrder) -> Iterator[str]:
    source = parse_source(spec)
    if isinstance(source, Conversations):
        raise UserError(
            f"Text source {spec} has conversations, for load tests and gradmap heal --chat "
            "alone; use file:, disk: or hub:."
        )
    for row, place in read_rows(source, order):
        yield from text_at(row, source.field, place)


def stripped_text_at(row: dict[str, Any], field: str, place: str) -> Iterator[str]:
    """As `text_at`, without space around it."""
    return (text.strip() for text in text_at(row, field, place))


def text_at(row: dict[str, Any], field: str, place: str) -> Iterator[str]:
    """The text that a row has under a field, none where that is null. Raises UserError if it has
    something else."""
    text = field_at(row, field, place)
    if text is None:
        return
    if not isinstance(text, str):
        cure = "; gradmap heal --chat reads conversations" if isinstance(text, list) else ""
        raise UserError(f"{place}: the field {field!r} is {kind_of(text)}, and no text{cure}.")
    require_whole_characters(text, field, place)
    yield text


def require_whole_characters(text: str, field: str, place: str) -> None:
    """Raises UserError if a text cannot be written: JSON may hold halves of characters."""
    if not is_text(text):
        raise UserError(
            f"{place}: the field {field!r} holds half of a character (a lone surrogate)."
        )


def field_at(row: dict[str, Any], field: str, place: str) -> Any:
    """As `value_at`; raises UserError where there is no such field."""
    try:
        return value_at(row, field)
    except LookupError:
        raise UserError(f"{place} has no field {field!r}.") from None


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
