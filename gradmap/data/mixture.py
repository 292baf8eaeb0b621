"""Samples without end from several texts by weight, to train on; always the same in the same
order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from gradmap.common.errors import UserError
from gradmap.common.files import sha256_json
from gradmap.data.calibration import bos_of
from gradmap.data.chat import ChatTemplate
from gradmap.data.documents import Beginning, Documents, Text, shuffled
from gradmap.data.texts import text_at

# So many documents are packed and shuffled at a time.
DOCUMENTS_TOGETHER = 256
SKIPPED_TOGETHER = 1024


@dataclass(frozen=True)
class Mixture:
    """Which samples to draw. texts: SPECs; weights: of each, for its share of the samples; tokens:
    T, of every sample, of which the first is BOS where the tokenizer puts one; held_out: how many
    samples are kept apart, which share no document with the others; chat: whether conversations are
    rendered, or refused."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]
    tokens: int
    held_out: int
    seed: int
    chat: bool = False

    def open(self, tokenizer: Any) -> Samples:
        """Raises UserError if a text is too short, or cannot be read, and for `chat` without
        conversations."""
        packing = Packing.of(tokenizer, self.tokens)
        template = ChatTemplate.of(tokenizer) if self.chat else None
        documents_at = text_at if template is None else template.documents_at
        shares = list(islice(in_proportion(self.weights), self.held_out))
        streams = [
            TextStream.open(Text(spec, self.seed, documents_at), packing, shares.count(place))
            for place, spec in enumerate(self.texts)
        ]
        if template is not None and not template.rendered:
            raise UserError(
                f"--chat was given, and {' and '.join(self.texts)} begin with no conversations; "
                "name the field that holds them, as in file:PATH#messages, or leave out --chat."
            )
        return Samples(streams, self.weights, packing.bos)


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

    def tokenise(self, documents: Sequence[str]) -> list[int]:
        """All of these documents, one after the other."""
        of_each = self.tokenizer(list(documents), add_special_tokens=False, verbose=False)
        return [token for ids in of_each["input_ids"] for token in (*ids, *self._behind(ids))]

    def _behind(self, ids: list[int]) -> list[int]:
        """What a chat template ends with may be EOS."""
        eos = self.tokenizer.eos_token_id
        return [] if eos is None or ids[-1:] == [eos] else [eos]

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
    held_out: list[list[int]]
    passes: int = 0

    @classmethod
    def open(cls, text: Text, packing: Packing, held_out: int) -> TextStream:
        """Raises UserError if there is not one sample beside those that are held out."""
        beginning = Beginning.read(text)
        ids: list[int] = []
        while len(ids) < held_out * packing.text_tokens and beginning.documents:
            ids += packing.tokenise([beginning.hold_out()])
        stream = cls(beginning.rest(), packing, packing.cut(ids)[0][:held_out])
        known = beginning.is_all
        if len(stream.held_out) < held_out or (known and next(stream._pass(0), None) is None):
            raise stream._too_short(held_out)
        return stream

    @property
    def spec(self) -> str:
        return self.documents.text.spec

    def samples(self) -> Iterator[list[int]]:
        """Each pass has the documents, and the samples of some of them, in another order. Raises
        UserError if the text is not there any more."""
        for number in count():
            self.passes = number + 1
            samples = self._pass(number)
            first = next(samples, None)
            if first is None:
                raise self._too_short(len(self.held_out))
            yield first
            yield from samples

    def _pass(self, number: int) -> Iterator[list[int]]:
        generator = random.Random(f"{self.documents.text.seed} {number}")
        order = shuffled(self.documents.in_pass(number), generator)
        ids: list[int] = []
        while together := list(islice(order, DOCUMENTS_TOGETHER)):
            ids += self.packing.tokenise(together)
            samples, ids = self.packing.cut(ids)
            generator.shuffle(samples)
            yield from samples

    def _too_short(self, held_out: int) -> UserError:
        return UserError(
            f"Text {self.spec} is too short: beside {held_out} samples of {self.packing.tokens} "
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
    _endless: Iterator[list[int]] = field(init=False)
    _digest: Any = field(default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        self._endless = self._all()

    @property
    def sha256(self) -> str:
        """Of the token ids that were drawn so far."""
        digest: str = self._digest.hexdigest()
        return digest

    @property
    def sha256_of_texts(self) -> str:
        return sha256_json([stream.documents.sha256 for stream in self.streams])

    @property
    def passes(self) -> dict[str, int]:
        """By text: through its documents, begun so far."""
        return {stream.spec: stream.passes for stream in self.streams}

    @property
    def held_out(self) -> Tensor:
        """(H, T)."""
        return torch.tensor([sample for stream in self.streams for sample in stream.held_out])

    def draw(self, samples: int) -> Tensor:
        """The next of them to train on, (n, T)."""
        drawn = torch.tensor(list(islice(self._endless, samples)))
        self._digest.update(drawn.numpy().tobytes())
        self.drawn += samples
        return drawn

    def skip(self, samples: int) -> None:
        """As many as were drawn by another process before this one."""
        for start in range(0, samples, SKIPPED_TOGETHER):
            self.draw(min(SKIPPED_TOGETHER, samples - start))

    def _all(self) -> Iterator[list[int]]:
        of_streams = [stream.samples() for stream in self.streams]
        for place in in_proportion(self.weights):
            yield next(of_streams[place])


def in_proportion(weights: Sequence[float]) -> Iterator[int]:
    """Places of the weights without end, each as often as its weight says: the one next that lags
    behind the most, the first of several."""
    drawn = [0] * len(weights)
    while True:
        place = min(range(len(weights)), key=lambda place: (drawn[place] + 1) / weights[place])
        drawn[place] += 1
        yield place
