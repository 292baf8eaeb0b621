"""How a model follows what the dense one wrote: would it have written the same?

The dense model's greedy answers are put into the other model's mouth, token by token (teacher
forcing). So one token that is written otherwise does not make all that follow another text, and
every place is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradmap.common.console import waiting
from gradmap.evaluation.answers import Written
from gradmap.evaluation.backends import ScoreRequest
from gradmap.evaluation.scoring import Scorer

# Of the dense model's distribution, so many tokens are kept in each place, and the rest as one.
KEPT_TOKENS = 256
DESCRIPTION = "Following the dense model's answers"

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Likely:
    """The k tokens that a model finds most likely in each of n places, as ids (n, k), and their log
    probabilities in nats (n, k)."""

    tokens: Tensor
    log_probabilities: Tensor

    @classmethod
    def of(cls, log_probabilities: Tensor) -> Likely:
        """Of the log probabilities of all tokens (n, V)."""
        kept = log_probabilities.topk(min(KEPT_TOKENS, log_probabilities.shape[1]), dim=1)
        return cls(kept.indices, kept.values)


@dataclass(frozen=True)
class Reference:
    """What the dense model wrote: answers with at least one token, and what it found likely in each
    place of them; None where its runtime does not show that."""

    requests: list[ScoreRequest]
    likely: list[Likely] | None


@dataclass(frozen=True)
class Followed:
    """How a model follows a reference, by answer. tokens: (A,). agreed: (A,), of how many the model
    finds the token of the answer most likely. divergences: (A,), KL from the reference summed over
    tokens, in nats; None where one of the runtimes does not show logits."""

    tokens: Values
    agreed: Values
    divergences: Values | None

    def describe(self) -> list[dict[str, Any]]:
        """A record of each answer."""
        divergences = [None] * len(self.tokens)
        if self.divergences is not None:
            divergences = self.divergences.tolist()
        rows = zip(self.tokens.tolist(), self.agreed.tolist(), divergences, strict=True)
        return [
            {"answer": row, "tokens": int(tokens), "agreed": int(agreed), "divergence": divergence}
            for row, (tokens, agreed, divergence) in enumerate(rows)
        ]


def make_reference(written: Written, scorer: Scorer) -> tuple[Reference, Followed]:
    """What the scorer's model wrote as the reference, and how it follows that itself."""
    requests, likely, agreed = written.requests, [], []
    with waiting(f"{DESCRIPTION}, {scorer.label}"):
        for request in requests:
            log_probabilities = scorer.backend.log_probabilities(request)
            if log_probabilities is None:
                return Reference(requests, None), _follow_by_scores(requests, scorer)
            likely.append(Likely.of(log_probabilities))
            agreed.append(_agreed(request, log_probabilities))
    followed = Followed(_lengths(requests), np.array(agreed, dtype=float), np.zeros(len(requests)))
    return Reference(requests, likely), followed


def follow(reference: Reference, scorer: Scorer) -> Followed:
    """How the scorer's model follows the reference."""
    requests, likely = reference.requests, reference.likely
    if likely is None:
        return _follow_by_scores(requests, scorer)
    agreed, divergences = [], []
    with waiting(f"{DESCRIPTION}, {scorer.label}"):
        for request, of_dense in zip(requests, likely, strict=True):
            log_probabilities = scorer.backend.log_probabilities(request)
            if log_probabilities is None:
                return _follow_by_scores(requests, scorer)
            agreed.append(_agreed(request, log_probabilities))
            divergences.append(divergence(of_dense, log_probabilities).sum().item())
    return Followed(_lengths(requests), np.array(agreed, dtype=float), np.array(divergences))


def _follow_by_scores(requests: Sequence[ScoreRequest], scorer: Scorer) -> Followed:
    """Where logits are not to be had: every runtime tells which tokens are the most likely."""
    scores = scorer.score(requests, DESCRIPTION)
    agreed = np.array([score.greedy_tokens for score in scores], dtype=float)
    return Followed(_lengths(requests), agreed, None)


def _agreed(request: ScoreRequest, log_probabilities: Tensor) -> int:
    """How many tokens of the continuation are the most likely ones, of log probabilities (n, V)."""
    chosen = log_probabilities.gather(1, torch.tensor(request.continuation)[:, None])[:, 0]
    return int((chosen >= log_probabilities.amax(dim=1)).sum())


def _lengths(requests: Sequence[ScoreRequest]) -> Values:
    return np.array([len(request.continuation) for request in requests], dtype=float)


def divergence(likely: Likely, log_probabilities: Tensor) -> Tensor:
    """KL of a model's distributions from the reference's, in nats: (n,).

    log_probabilities: the model's, of all tokens (n, V). The tokens that are not kept of the
    reference count as one, so this is a lower bound: what is joined has no larger KL (Cover and
    Thomas 2006, theorem 2.7.1, the log sum inequality). It is exact where all V are kept.
    """
    theirs = log_probabilities.gather(1, likely.tokens)
    kept = (likely.log_probabilities.exp() * (likely.log_probabilities - theirs)).sum(dim=1)
    rest, their_rest = _rest(likely.log_probabilities), _rest(theirs)
    return kept + torch.xlogy(rest, rest) - torch.xlogy(rest, their_rest)


def _rest(log_probabilities: Tensor) -> Tensor:
    """The probability of all other tokens than these (n, k): (n,), never quite nothing."""
    rest = 1 - log_probabilities.exp().sum(dim=1)
    return rest.clamp(min=torch.finfo(rest.dtype).tiny)


def divergence_reference(expected: Tensor, actual: Tensor) -> Tensor:
    """KL of `actual` from `expected`, both log probabilities of all tokens (n, V), term by term:
    (n,). For tests."""
    places = []
    for own, theirs in zip(expected.tolist(), actual.tolist(), strict=True):
        places.append(sum(math.exp(a) * (a - b) for a, b in zip(own, theirs, strict=True)))
    return torch.tensor(places, dtype=torch.float64)
