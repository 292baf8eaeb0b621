"""The token ids that everything is measured on: calibration samples and evaluation segments."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmap.console import waiting
from gradmap.errors import UserError
from gradmap.texts import read_texts

# Eq. 7 uses every sample; the corrections are fitted on three quarters and judged on the held-out last quarter.
HELD_OUT_FRACTION = 0.25


@dataclass(frozen=True)
class Calibration:
    """N samples of T tokens: `input_ids` (N, T), int64. `source` is the SPEC they were drawn from.

    held_out: how many of them, the last, are not fitted on; None for a quarter.
    """

    source: str
    seed: int
    input_ids: Tensor
    held_out: int | None = None

    @property
    def sha256(self) -> str:
        return hash_token_ids(self.input_ids)

    @property
    def held_out_samples(self) -> int:
        if self.held_out is not None:
            return self.held_out
        return max(1, round(len(self.input_ids) * HELD_OUT_FRACTION))

    @property
    def fit_ids(self) -> Tensor:
        return self.input_ids[: len(self.input_ids) - self.held_out_samples]

    @property
    def held_out_ids(self) -> Tensor:
        return self.input_ids[len(self.input_ids) - self.held_out_samples :]


def hash_token_ids(input_ids: Tensor) -> str:
    """Returns the SHA-256 of a token id matrix, shape included."""
    ids = input_ids.to(torch.int64).contiguous()
    return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.numpy().tobytes()).hexdigest()


def build_calibration(tokenizer: Any, source: str, samples: int, tokens: int, seed: int) -> Calibration:
    """Draws `samples` windows of `tokens` tokens, from as many different documents as there are.

    Raises UserError if the text is too short.
    """
    if samples < 2:
        raise UserError(f"--samples is {samples}; at least 2 are needed, since some are held out.")
    if tokens < 2:
        raise UserError(f"--tokens is {tokens}; at least 2 are needed to predict a next token.")
    documents = read_texts(source, seed)
    with waiting(f"Tokenising {source}"):
        windows = _draw_windows(tokenizer, documents, samples, tokens, random.Random(seed))
    if len(windows) < samples:
        raise UserError(
            f"Calibration text {source} is too short: it has {len(windows)} windows of {tokens} tokens and {samples} "
            f"are needed; give more text, or fewer --samples or --tokens."
        )
    return Calibration(source, seed, torch.tensor(windows))


def _draw_windows(
    tokenizer: Any, documents: list[str], samples: int, tokens: int, generator: random.Random
) -> list[list[int]]:
    """Takes one random window of every document, then a second one, and so on until there are enough."""
    chosen: list[list[int]] = []
    spare: list[list[int]] = []
    for ids in _tokenise(tokenizer, documents):
        windows = _cut(ids, tokens)
        generator.shuffle(windows)
        chosen += windows[:1]
        spare += windows[1:]
        if len(chosen) == samples:
            return chosen
    generator.shuffle(spare)
    return chosen + spare[: samples - len(chosen)]


def build_segments(tokenizer: Any, source: str, tokens: int, limit: int | None, seed: int) -> Tensor:
    """Joins the documents of a source and cuts them into segments of `tokens` tokens: (S, T), at most `limit`.

    This is the paper's perplexity protocol (section 3: 128-token segments). Raises UserError if there is no
    full segment.
    """
    documents = [text + "\n\n" for text in read_texts(source, seed)]
    with waiting(f"Tokenising {source}"):
        joined = _join(_tokenise(tokenizer, documents), None if limit is None else limit * tokens)
    segments = _cut(joined, tokens)[:limit]
    if not segments:
        raise UserError(f"Evaluation text {source} has {len(joined)} tokens, less than one segment of {tokens}.")
    return torch.tensor(segments)


def _join(tokenised: Iterable[list[int]], enough: int | None) -> list[int]:
    """All of them, or as many as make up `enough` tokens."""
    joined: list[int] = []
    for ids in tokenised:
        joined += ids
        if enough is not None and len(joined) >= enough:
            break
    return joined


def _tokenise(tokenizer: Any, documents: list[str]) -> Iterator[list[int]]:
    for text in documents:
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _cut(ids: list[int], tokens: int) -> list[list[int]]:
    return [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
