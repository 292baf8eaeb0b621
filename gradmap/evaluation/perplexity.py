"""Perplexity on segments of a fixed number of tokens: the paper's protocol (section 3).

Where the tokenizer begins a text with BOS, so does every segment, and all tokens of the segment are
predicted. Else its first token is context only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gradmap.common.errors import UserError
from gradmap.data.calibration import bos_of, build_segments, hash_token_ids, with_bos
from gradmap.data.text_specs import preset_of
from gradmap.evaluation.backends import ScoreRequest
from gradmap.evaluation.scoring import Scorer

# Nats per token. exp of 709 is the largest number, and of such perplexities there are products and
# ratios.
HIGHEST_LOSS = 300.0


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error; None of a single observation."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Segments:
    """Evaluation text as token ids (S, T), without BOS; `source` is the SPEC it was cut from.

    bos: the token that stands before each segment, if the tokenizer puts one.
    """

    name: str
    source: str
    input_ids: Tensor
    bos: int | None = None

    @classmethod
    def read(
        cls, tokenizer: Any, name: str, source: str, tokens: int, limit: int | None
    ) -> Segments:
        """Segments of `tokens` tokens of the SPEC `source`, at most `limit` of them. Raises
        UserError if the text is missing, damaged or too short."""
        input_ids = build_segments(tokenizer, source, tokens, limit)
        return cls(name, source, input_ids, bos_of(tokenizer))

    @property
    def predicted_tokens(self) -> int:
        """How many tokens of each segment are predicted."""
        tokens = self.input_ids.shape[1]
        return tokens - 1 if self.bos is None else tokens

    def describe(self) -> dict[str, Any]:
        """The fields of gradmap.evaluation.result.TextRecord."""
        segments, tokens = self.input_ids.shape
        return {
            "source": self.source,
            "separator": preset_of(self.source).separator,
            "segments": segments,
            "tokens": tokens,
            "bos": self.bos,
            "predicted_tokens": self.predicted_tokens,
            "sha256": hash_token_ids(self.input_ids),
        }


def segment_losses(scorer: Scorer, segments: Segments) -> npt.NDArray[np.float64]:
    """Mean next-token cross-entropy of every segment, nats per token: (S,)."""
    rows = with_bos(segments.input_ids, segments.bos).tolist()
    requests = [ScoreRequest((row[0],), tuple(row[1:])) for row in rows]
    scores = scorer.score(requests, f"Perplexity on {segments.name}")
    return np.array([-score.log_likelihood for score in scores]) / segments.predicted_tokens


def perplexity_of_losses(losses: npt.NDArray[np.float64]) -> Estimate:
    """exp of the mean loss (S,) of segments, and its standard error.

    Every segment predicts the same number of tokens, so segments are the independent units; the
    standard error of the mean loss, times the perplexity (first-order propagation through exp).

    Raises UserError if it is beyond the range of numbers.
    """
    if losses.max() > HIGHEST_LOSS:
        raise UserError(
            f"A loss of {losses.max():.0f} nats per token has no perplexity; the model is broken."
        )
    value = float(np.exp(losses.mean()))
    return Estimate(
        value, None if len(losses) < 2 else value * float(losses.std(ddof=1)) / len(losses) ** 0.5
    )
