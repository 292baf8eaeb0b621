"""The token ids that everything is measured on: calibration samples and evaluation segments."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradmap.common.console import waiting
from gradmap.common.errors import UserError
from gradmap.data.texts import read_joined, read_texts

# Eq. 7 uses every sample; the corrections are fitted on three quarters and judged on the held-out
# last quarter.
HELD_OUT_FRACTION = 0.25
# Of a long text only a beginning is tokenised, which is lengthened until it has enough tokens; what
# follows the place where it ends can change how its last tokens are split, so that these are more
# than any one word has.
CHARACTERS_PER_TOKEN = 8
UNSETTLED_TOKENS = 64


@dataclass(frozen=True)
class Calibration:
    """N samples of T tokens: `input_ids` (N, T), int64. `source` is the SPEC they were drawn from.

    bos: the first of the T tokens of every sample, if the tokenizer begins a text with one. It is
    not predicted. held_out: how many of them, the last, are not fitted on; None for a quarter.
    """

    source: str
    seed: int
    input_ids: Tensor
    bos: int | None = None
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

    def fitted_also_on(self, input_ids: Tensor) -> Calibration:
        """This calibration with more samples to fit on, (n, T) token ids; the same are held out."""
        together = torch.cat([self.fit_ids, input_ids, self.held_out_ids])
        return replace(self, input_ids=together, held_out=self.held_out_samples)


def hash_token_ids(input_ids: Tensor) -> str:
    """Returns the SHA-256 of a token id matrix (N, T), shape included."""
    ids = input_ids.to(torch.int64).contiguous()
    return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.numpy().tobytes()).hexdigest()


def bos_of(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts in front of a text, None if it puts none. Raises UserError
    for several."""
    plain, whole = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    begins = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    if not begins:
        raise UserError(
            "The tokenizer splits a text otherwise when it adds special tokens, which is not "
            "supported."
        )
    front = whole[: begins[0]]
    if len(front) > 1:
        raise UserError(
            f"The tokenizer puts {len(front)} tokens in front of a text; only one, or none, is "
            "supported."
        )
    return front[0] if front else None


def with_bos(text_ids: Tensor, bos: int | None) -> Tensor:
    """Token ids (N, T) with BOS before each row, (N, T + 1); as they are if there is no BOS."""
    if bos is None:
        return text_ids
    return torch.cat([text_ids.new_full((len(text_ids), 1), bos), text_ids], dim=1)


def without_bos(input_ids: Tensor, bos: int | None) -> Tensor:
    """Token ids (N, T) without the BOS that `with_bos` put before each row, (N, T - 1)."""
    return input_ids if bos is None else input_ids[:, 1:]


def build_calibration(
    tokenizer: Any, source: str, samples: int, tokens: int, seed: int
) -> Calibration:
    """Draws `samples` windows from as many different documents as there are. With the BOS token,
    where the tokenizer puts one, each has `tokens` tokens.

    Raises UserError if the text is too short.
    """
    if samples < 2:
        raise UserError(f"--samples is {samples}; at least 2 are needed, since some are held out.")
    if tokens < 2:
        raise UserError(f"--tokens is {tokens}; at least 2 are needed to predict a next token.")
    bos = bos_of(tokenizer)
    text_tokens = tokens if bos is None else tokens - 1
    documents = read_texts(source, seed)
    with waiting(f"Tokenising {source}"):
        windows = _draw_windows(tokenizer, documents, samples, text_tokens, random.Random(seed))
    if len(windows) < samples:
        raise UserError(
            f"Calibration text {source} is too short: it has {len(windows)} windows of "
            f"{text_tokens} tokens and {samples} are needed; give more text, or fewer --samples or "
            "--tokens."
        )
    return Calibration(source, seed, with_bos(torch.tensor(windows), bos), bos)


def _draw_windows(
    tokenizer: Any, documents: list[str], samples: int, tokens: int, generator: random.Random
) -> list[list[int]]:
    """Takes one random window of every document, then a second one, and so on until there are
    enough."""
    chosen: list[list[int]] = []
    spare: list[list[int]] = []
    for text in documents:
        windows = _cut(_tokenise(tokenizer, text), tokens)
        generator.shuffle(windows)
        chosen += windows[:1]
        spare += windows[1:]
        if len(chosen) == samples:
            return chosen
    generator.shuffle(spare)
    return chosen + spare[: samples - len(chosen)]


def build_segments(tokenizer: Any, source: str, tokens: int, limit: int | None) -> Tensor:
    """Cuts the joined rows of a source into segments of `tokens` tokens, without BOS: (S, T), the
    first `limit`.

    This is the paper's perplexity protocol (section 3: 128-token segments), as public code has it:
    rows in their order and as they are, joined, tokenised as one text. Raises UserError if there is
    no full segment.
    """
    text = read_joined(source)
    with waiting(f"Tokenising {source}"):
        ids = _tokenise_beginning(tokenizer, text, None if limit is None else limit * tokens)
    segments = _cut(ids, tokens)[:limit]
    if not segments:
        raise UserError(
            f"Evaluation text {source} has {len(ids)} tokens, less than one segment of {tokens}."
        )
    return torch.tensor(segments)


def _tokenise_beginning(tokenizer: Any, text: str, enough: int | None) -> list[int]:
    """The text's first tokens, at least `enough` if it has so many; all of them for None."""
    if enough is None:
        return _tokenise(tokenizer, text)
    characters = CHARACTERS_PER_TOKEN * enough
    while characters < len(text):
        ids = _tokenise(tokenizer, text[:characters])
        if len(ids) >= enough + UNSETTLED_TOKENS:
            return ids
        characters *= 2
    return _tokenise(tokenizer, text)


def _tokenise(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _cut(ids: list[int], tokens: int) -> list[list[int]]:
    return [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
