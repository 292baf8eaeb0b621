"""What a model is asked to go on with: beginnings of texts, or questions of conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, count
from typing import Any

from gradmap.common.errors import UserError
from gradmap.data.chat import ChatTemplate
from gradmap.data.documents import Text, hash_document, shuffled
from gradmap.data.mixture import Mixture, TextStream, in_proportion


def questions(mixture: Mixture, tokenizer: Any) -> Iterator[list[int]]:
    """Yields token ids without end: what conversations begin with, up to the user's first turn, as
    the chat template asks for an answer; BOS where the tokenizer puts one. Held-out conversations
    are not asked, and none that is longer than a sample. The texts take turns.

    Raises UserError if there is none.
    """
    template = ChatTemplate.of(tokenizer)
    of_texts = [_of_stream(stream, template) for stream in mixture.open(tokenizer).streams]
    found = [(next(questions, None), questions) for questions in of_texts]
    asking = [chain([first], rest) for first, rest in found if first is not None]
    if not asking:
        raise UserError(
            f"No conversation begins with a user's turn that fits into {mixture.tokens} tokens, "
            "and --written has nothing to answer; give more --tokens, or other conversations."
        )
    for place in in_proportion([1.0] * len(asking)):
        yield next(asking[place])


def _of_stream(stream: TextStream, template: ChatTemplate) -> Iterator[list[int]]:
    """Those of one text, in another order in each pass."""
    held_out = stream.documents.left_out

    def questions_at(row: dict[str, Any], field: str, place: str) -> Iterator[str]:
        for turns, document in template.conversations_at(row, field, place):
            if hash_document(document) not in held_out:
                yield from template.questions_of(turns)

    for number in count():
        text = Text(stream.name, stream.seed, questions_at)
        generator = random.Random(f"{stream.seed} {number}")
        fitting = _tokenised(shuffled(text.read(number), generator), stream)
        first = next(fitting, None)
        if first is None:
            return
        yield first
        yield from fitting


def _tokenised(texts: Iterator[str], stream: TextStream) -> Iterator[list[int]]:
    packing = stream.packing
    front = [] if packing.bos is None else [packing.bos]
    for text in texts:
        ids = packing.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= packing.text_tokens:
            yield [*front, *ids]


def enough_to_write(prompts: Iterator[list[int]], tokens: int) -> list[list[int]]:
    """As many prompts as can be needed at most until so many tokens are written, when each is
    followed by one."""
    taken: list[list[int]] = []
    while tokens > 0:
        taken.append(next(prompts))
        tokens -= len(taken[-1]) + 1
    return taken
