"""Where prompts come from: random token ids, documents, or recorded conversations. Fresh ones for
every load."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gradmap.common.errors import UserError
from gradmap.data.text_specs import Conversations, FileSource, parse_source
from gradmap.data.texts import read_texts
from loadtest.conversations import Exchange, RecordCount, read_conversations, read_documents
from loadtest.options import LEAST_OUTPUT_TOKENS


@dataclass(frozen=True)
class Workload:
    """What a request looks like.

    prompt_tokens, output_tokens: its lengths; of texts, the most. length_spread: both vary,
    uniformly, by up to this share. shared_prefix: so many first tokens are the same in all prompts
    of a load. texts: SPEC of the prompts' texts (gradmap.data.text_specs); None for random token
    ids.
    """

    prompt_tokens: int = 128
    output_tokens: int = 64
    length_spread: float = 0.0
    shared_prefix: int = 0
    texts: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    token_ids: tuple[int, ...]
    output_tokens: int


class Prompts(Protocol):
    """Gives `count` prompts for a load; for the same name, which does not tell the arm, the same
    ones again.

    records: of the file that they are out of, where records of it may be skipped.
    """

    records: RecordCount | None

    def take(self, name: str, count: int) -> list[Prompt]: ...


class RandomPrompts:
    """Token ids below `vocabulary`. Only a shared prefix is shared, so that the server's prefix
    cache stays out."""

    records: RecordCount | None = None

    def __init__(self, workload: Workload, vocabulary: int) -> None:
        self._workload, self._vocabulary = workload, vocabulary

    def take(self, name: str, count: int) -> list[Prompt]:
        workload, generator = self._workload, random.Random(f"{self._workload.seed} {name}")
        shared = generator.choices(range(self._vocabulary), k=workload.shared_prefix)
        prompts = []
        for _ in range(count):
            length = max(1, self._vary(workload.prompt_tokens, generator) - len(shared))
            own = generator.choices(range(self._vocabulary), k=length)
            output_tokens = max(LEAST_OUTPUT_TOKENS, self._vary(workload.output_tokens, generator))
            prompts.append(Prompt((*shared, *own), output_tokens))
        return prompts

    def _vary(self, tokens: int, generator: random.Random) -> int:
        return round(tokens * (1 + self._workload.length_spread * generator.uniform(-1, 1)))


class TextPrompts:
    """Texts in an order that the seed fixes, no text twice."""

    def __init__(self, workload: Workload, tokenizer: Any) -> None:
        """Raises UserError if the texts cannot be read."""
        assert workload.texts is not None
        self._workload, self._tokenizer = workload, tokenizer
        self._texts, self.records = _read_exchanges(workload.texts, workload.seed)
        self._given: dict[str, list[Prompt]] = {}

    def take(self, name: str, count: int) -> list[Prompt]:
        """Raises UserError if there are too few texts."""
        if name not in self._given:
            used = sum(map(len, self._given.values()))
            if used + count > len(self._texts):
                raise UserError(
                    f"{self._workload.texts} has {len(self._texts)} texts, and every load wants "
                    "fresh ones; give more, or ask for fewer --requests, --pairs or loads."
                )
            self._given[name] = [
                self._as_prompt(*text) for text in self._texts[used : used + count]
            ]
        return self._given[name]

    def _as_prompt(self, text: str, answer: str | None) -> Prompt:
        token_ids = tuple(self._tokenizer(text).input_ids[: self._workload.prompt_tokens])
        output_tokens = self._workload.output_tokens
        if answer is not None:
            answered = len(self._tokenizer(answer, add_special_tokens=False).input_ids)
            output_tokens = max(LEAST_OUTPUT_TOKENS, min(output_tokens, answered))
        return Prompt(token_ids, output_tokens)


def _read_exchanges(spec: str, seed: int) -> tuple[Sequence[Exchange], RecordCount | None]:
    """What is of use in JSON lines or conversations; another source is whole or refused."""
    match parse_source(spec):
        case Conversations(path):
            return read_conversations(path, seed)
        case FileSource(path, field) as source if source.is_json_lines:
            return read_documents(path, field, seed)
    return [(text, None) for text in read_texts(spec, seed)], None
