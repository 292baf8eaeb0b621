"""Samples without end from several texts by weight, to train on; always the same in the same
order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor

from gradmap.common.errors import UserError
from gradmap.common.files import sha256_json
from gradmap.data.calibration import bos_of
from gradmap.data.chat import ChatTemplate
from gradmap.data.documents import Beginning, Document, Documents, Text
from gradmap.data.texts import stripped_text_at

# So many documents are packed and shuffled at a time.
DOCUMENTS_TOGETHER = 256
SKIPPED_TOGETHER = 1024
# The name of what the dense model wrote.
WRITTEN = "--written"


@dataclass(frozen=True)
class Mixture:
    """Which samples to draw. texts: SPECs; weights: of each, for its share of the samples, and one
    more for what the dense model writes, if it does; tokens: T, of every sample, of which the first
    is BOS where the tokenizer puts one; held_out: how many samples are kept apart, which share no
    document with the others; chat: whether conversations are rendered, or refused."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]
    tokens: int
    held_out: int
    seed: int
    chat: bool = False

    @property
    def without_written(self) -> Mixture:
        return replace(self, weights=self.weights[: len(self.texts)])

    def open(self, tokenizer: Any, written: Sequence[Document] | None = None) -> Samples:
        """written: by the dense model; None if it is not at hand, so that its samples are left out
        wherever they would be.

        Raises UserError if a text is too short, or cannot be read, and for `chat` without
        conversations.
        """
        packing = Packing.of(tokenizer, self.tokens)
        places = list(islice(in_proportion(self.weights), self.held_out))
        shares = [places.count(place) for place in range(len(self.weights))]
        beginnings = self._beginnings(tokenizer)
        if written is not None:
            beginnings = chain(beginnings, [Beginning.of(WRITTEN, written)])
        streams = [
            TextStream.open(beginning, packing, self.seed, held_out)
            for beginning, held_out in zip(beginnings, shares, strict=False)
        ]
        return Samples(streams, self.weights, packing.bos)

    def _beginnings(self, tokenizer: Any) -> Iterator[Beginning]:
        template = ChatTemplate.of(tokenizer) if self.chat else None
        documents_at = stripped_text_at if template is None else template.documents_at
        for spec in self.texts:
            yield Beginning.read(Text(spec, self.seed, documents_at))
        if template is not None and not template.rendered:
            raise UserError(
                f"--chat was given, and {' and '.join(self.texts)} begin with no conversations; "
                "name the field that holds them, as in file:PATH#messages, or leave out --chat."
            )


@dataclass(frozen=True)
class Packing:
    """Documents become samples of `tokens` tokens: one after the other, with EOS behind each that
    does not end with it, and cut; `bos` comes before every sample. None if the tokenizer has
    none."""

    tokenizer: Any
    tokens: int
    bos: int | None

    @classmethod
    def of(cls, tokenizer: Any, tokens: int) -> Packing:
        return cls(tokenizer, tokens, bos_of(tokenizer))

    @property
    def text_tokens(self) -> int:
        return self.tokens if self.bos is None else self.tokens - 1

    def tokenise(self, documents: Iterable[Document]) -> list[int]:
        """All of these documents, one after the other."""
        texts = [document for document in documents if isinstance(document, str)]
        known = [document for document in documents if not isinstance(document, str)]
        if texts:
            known += self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [token for ids in known for token in (*ids, *self._behind(ids))]

    def _behind(self, ids: Sequence[int]) -> list[int]:
        """What a chat template ends with may be EOS."""
        eos = self.tokenizer.eos_token_id
        return [] if eos is None or (ids and ids[-1] == eos) else [eos]

    def cut(self, ids: list[int]) -> tuple[list[list[int]], list[int]]:
        """Samples (n, T), and what is left behind the last."""
        front = [] if self.bos is None else [self.bos]
        ends = range(self.text_tokens, len(ids) + 1, self.text_tokens)
        samples = [front + ids[end - self.text_tokens : end] for end in ends]
        return samples, ids[len(samples) * self.text_tokens :]


@dataclass
class TextStream:
    """The samples of one text: some held out, the others again and again. passes: through all of
    its documents, begun so far."""

    documents: Documents
    packing: Packing
    seed: int
    held_out: list[list[int]]
    passes: int = 0

    @classmethod
    def open(cls, beginning: Beginning, packing: Packing, seed: int, held_out: int) -> TextStream:
        """Raises UserError if there is not one sample beside those that are held out."""
        ids: list[int] = []
        while len(ids) < held_out * packing.text_tokens and beginning.documents:
            ids += packing.tokenise([beginning.hold_out()])
        stream = cls(beginning.rest(), packing, seed, packing.cut(ids)[0][:held_out])
        is_all = beginning.more is None
        if len(stream.held_out) < held_out or (is_all and next(stream.in_pass(0), None) is None):
            raise stream._too_short(held_out)
        return stream

    @property
    def name(self) -> str:
        return self.documents.name

    def samples(self) -> Iterator[list[int]]:
        """Each pass has the documents, and the samples of some of them, in another order. Raises
        UserError if the text is not there any more."""
        for number in count():
            self.passes = number + 1
            samples = self.in_pass(number)
            first = next(samples, None)
            if first is None:
                raise self._too_short(len(self.held_out))
            yield first
            yield from samples

    def in_pass(self, number: int) -> Iterator[list[int]]:
        generator = random.Random(f"{self.seed} {number}")
        order = self.documents.in_pass(number, generator)
        ids: list[int] = []
        while together := list(islice(order, DOCUMENTS_TOGETHER)):
            ids += self.packing.tokenise(together)
            samples, ids = self.packing.cut(ids)
            generator.shuffle(samples)
            yield from samples

    def _too_short(self, held_out: int) -> UserError:
        return UserError(
            f"Text {self.name} is too short: beside {held_out} samples of {self.packing.tokens} "
            "tokens that are held out, whole documents for at least one more are needed; give "
            "more text, or fewer --held-out or --tokens."
        )


@dataclass
class Samples:
    """What a mixture gives. bos: the first token of every sample, if the tokenizer puts one there.
    drawn: how many to train on so far."""

    streams: Sequence[TextStream]
    weights: Sequence[float]
    bos: int | None
    drawn: int = 0
    _endless: Iterator[tuple[str, list[int]]] = field(init=False)
    _digest: Any = field(default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        self._endless = self._all()

    @property
    def sha256(self) -> str:
        """Of the token ids that were drawn from texts so far."""
        digest: str = self._digest.hexdigest()
        return digest

    @property
    def sha256_of_texts(self) -> str:
        return sha256_json([stream.documents.sha256 for stream in self.streams])

    @property
    def passes(self) -> dict[str, int]:
        """By text: through its documents, begun so far."""
        return {stream.name: stream.passes for stream in self.streams}

    @property
    def held_out(self) -> Tensor:
        """(H, T)."""
        return torch.tensor([sample for stream in self.streams for sample in stream.held_out])

    def draw(self, samples: int) -> Tensor:
        """The next of them to train on, (n, T); fewer where what the dense model wrote is not at
        hand."""
        drawn = list(islice(self._endless, samples))
        self.drawn += samples
        of_texts = [ids for name, ids in drawn if name != WRITTEN]
        self._digest.update(torch.tensor(of_texts).numpy().tobytes())
        return torch.tensor([ids for _, ids in drawn if ids])

    def skip(self, samples: int) -> None:
        """As many as were drawn by another process before this one."""
        for start in range(0, samples, SKIPPED_TOGETHER):
            self.draw(min(SKIPPED_TOGETHER, samples - start))

    def _all(self) -> Iterator[tuple[str, list[int]]]:
        """With the name of the text; no ids where they are not at hand."""
        of_streams = {stream.name: stream.samples() for stream in self.streams}
        names = [stream.name for stream in self.streams]
        for place in in_proportion(self.weights):
            name = names[place] if place < len(names) else WRITTEN
            yield name, next(of_streams[name]) if name in of_streams else []


def in_proportion(weights: Sequence[float]) -> Iterator[int]:
    """Places of the weights without end, each as often as its weight says: the one next that lags
    behind the most, the first of several."""
    drawn = [0] * len(weights)
    while True:
        place = min(range(len(weights)), key=lambda place: (drawn[place] + 1) / weights[place])
        drawn[place] += 1
        yield place
