"""Conversations become documents to train on, as the tokenizer's chat template writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from gradmap.common.console import say
from gradmap.common.errors import UserError, first_line
from gradmap.data.calibration import bos_of
from gradmap.data.conversations import Turn, turns_of
from gradmap.data.texts import field_at, require_whole_characters, stripped_text_at

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
        if isinstance(field_at(row, field, place), list):
            for _, document in self.conversations_at(row, field, place):
                yield document
        else:
            yield from stripped_text_at(row, field, place)

    def conversations_at(
        self, row: dict[str, Any], field: str, place: str
    ) -> Iterator[tuple[list[Turn], str]]:
        """The turns that a row has under a field, and its document; none for text. Otherwise as
        `documents_at`."""
        value = field_at(row, field, place)
        if not value or not isinstance(value, list):
            return
        turns = turns_of(value)
        if turns is None:
            raise UserError(
                f"{place}: the field {field!r} is a list, and no conversation; every turn needs "
                "the texts role and content, or from and value."
            )
        for turn in turns:
            require_whole_characters(turn.content, field, place)
        try:
            document = self.render(turns)
        except TemplateError as error:
            self._leave_out(f"{place}: {first_line(error)}")
            return
        self.rendered += 1
        yield turns, document.strip()

    def _leave_out(self, what: str) -> None:
        if not self.refused:
            say(f"Conversations that the chat template refuses are left out, such as {what}")
        self.refused += 1

    def questions_of(self, turns: Sequence[Turn]) -> Iterator[str]:
        """A conversation up to the user's first turn, to be answered; none if it begins with
        another."""
        for number, turn in enumerate(turns):
            if turn.role != "system":
                if turn.role == "user":
                    yield self.render(turns[: number + 1], to_be_answered=True)
                return

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
