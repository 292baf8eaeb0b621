"""Perplexity on segments of a fixed number of tokens: the paper's protocol (section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gradmap.calibration import build_segments, hash_token_ids
from gradmap.evaluation.backends import Request
from gradmap.evaluation.scoring import Scorer


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error (NaN with a single observation)."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Segments:
    """Evaluation text as token ids (S, T); `source` is the SPEC it was cut from."""

    name: str
    source: str
    input_ids: Tensor

    @classmethod
    def read(cls, tokenizer: Any, name: str, source: str, tokens: int, limit: int | None, seed: int) -> Segments:
        return cls(name, source, build_segments(tokenizer, source, tokens, limit, seed))

    def describe(self) -> dict[str, Any]:
        """What was evaluated on, for the record."""
        segments, tokens = self.input_ids.shape
        sha256 = hash_token_ids(self.input_ids)
        return {"source": self.source, "segments": segments, "tokens": tokens, "sha256": sha256}


def segment_losses(scorer: Scorer, segments: Segments) -> npt.NDArray[np.float64]:
    """Mean next-token cross-entropy of every segment, nats per token: (S,)."""
    rows = segments.input_ids.tolist()
    requests = [Request((row[0],), tuple(row[1:])) for row in rows]
    scores = scorer.score(requests, f"Perplexity on {segments.name}")
    return np.array([-score.log_likelihood for score in scores]) / (segments.input_ids.shape[1] - 1)


def perplexity_of_losses(losses: npt.NDArray[np.float64]) -> Estimate:
    """exp of the mean loss (S,) of segments, and its standard error.

    Every segment predicts the same number of tokens, so segments are the independent units; the standard error of
    the mean loss, times the perplexity (first-order propagation through exp).
    """
    value = float(np.exp(losses.mean()))
    stderr = value * float(losses.std(ddof=1)) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
    return Estimate(value, stderr)
