"""Conversations become documents to train on, as the tokenizer's chat template writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gradmap.common.console import say
from gradmap.common.errors import UserError, first_line
from gradmap.data.calibration import bos_of
from gradmap.data.conversations import Turn, turns_of
from gradmap.data.texts import field_at, require_whole_characters, text_at

# Some templates write the date. It is this one, so that samples are the same on another day.
TODAY = datetime(2024, 7, 26)
PLACEHOLDER = "PLACEHOLDER"


@dataclass
class ChatTemplate:
    """A tokenizer's. bos: what it writes in front where the tokenizer puts one too; else empty.

    rendered, refused: how many conversations so far.
    """

    tokenizer: Any
    bos: str
    rendered: int = 0
    refused: int = 0

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """Raises UserError if the tokenizer has none."""
        if not tokenizer.chat_template:
            raise UserError(
                "The tokenizer has no chat template to render conversations with; leave out "
                "--chat and name a field of text, or put a chat_template.jinja into the model's "
                "directory."
            )
        bos = bos_of(tokenizer)
        return cls(tokenizer, "" if bos is None else tokenizer.convert_ids_to_tokens(bos))

    def documents_at(self, row: dict[str, Any], field: str, place: str) -> Iterator[str]:
        """The document that a row has under a field: a conversation is rendered, text stays as it
        is. None where that is null or empty, or the template refuses it, which is said once.

        Raises UserError if it has something else.
        """
        value = field_at(row, field, place)
        if not isinstance(value, list):
            yield from text_at(row, field, place)
            return
        turns = turns_of(value)
        if turns is None and value:
            raise UserError(
                f"{place}: the field {field!r} is a list, and no conversation; every turn needs "
                "the texts role and content, or from and value."
            )
        for turn in turns or ():
            require_whole_characters(turn.content, field, place)
        if turns and (document := self._rendered(turns, place)):
            yield document

    def _rendered(self, turns: Sequence[Turn], place: str) -> str | None:
        from jinja2 import TemplateError

        try:
            document = self.render(turns)
        except TemplateError as error:
            if not self.refused:
                say(
                    "Conversations that the chat template refuses are left out, such as "
                    f"{place}: {first_line(error)}"
                )
            self.refused += 1
            return None
        self.rendered += 1
        return document

    @property
    def marks(self) -> frozenset[str]:
        """What the template writes around turns beside special tokens, such as their roles: words
        with one space between them."""
        turns = [Turn("user", PLACEHOLDER), Turn("assistant", PLACEHOLDER)]
        texts = self.render(2 * turns).split(PLACEHOLDER)
        pieces = (piece for text in texts for piece in split_at_special(text, self.tokenizer))
        return frozenset(filter(None, (" ".join(piece.split()) for piece in pieces)))

    def render(self, turns: Sequence[Turn], *, to_be_answered: bool = False) -> str:
        """A conversation as one text, without BOS. to_be_answered: with what the template puts in
        front of an answer. Raises jinja2's TemplateError if the template refuses it."""
        text: str = self.tokenizer.apply_chat_template(
            [turn._asdict() for turn in turns],
            tokenize=False,
            add_generation_prompt=to_be_answered,
            strftime_now=TODAY.strftime,
        )
        return text.removeprefix(self.bos)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Of tokens that are no text, such as EOS, and those that a template opens turns with."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {
        number for number, token in added if token.special
    }


def split_at_special(text: str, tokenizer: Any) -> list[str]:
    """What a text has between special tokens."""
    tokens = map(re.escape, tokenizer.convert_ids_to_tokens(special_ids(tokenizer)))
    return re.split("|".join(tokens), text)
