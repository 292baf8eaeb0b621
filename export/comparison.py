"""How an artifact compares with its reference, and what it must keep: as it is judged, and as it is
recorded."""

from __future__ import annotations

from dataclasses import dataclass, fields

# Of the most likely tokens of a quantised model, those that must be the reference's unless the user
# says otherwise.
MIN_AGREEMENT = 0.9


@dataclass(frozen=True)
class Bounds:
    """What an artifact must keep: `tolerance` on relative differences, or `min_agreement` if it is
    quantised, and `max_divergence` and `max_perplexity_ratio` if the user says so, where these are
    known.

    stray_share: of the positions, which may differ by more than the tolerance (export.tolerance).
    """

    tolerance: float | None = None
    min_agreement: float | None = None
    stray_share: float = 0.0
    max_divergence: float | None = None
    max_perplexity_ratio: float | None = None

    def within(self, others: Bounds) -> Bounds:
        """The stricter of both in each respect."""
        return Bounds(
            tolerance=_smallest(self.tolerance, others.tolerance),
            min_agreement=_largest(self.min_agreement, others.min_agreement),
            stray_share=min(self.stray_share, others.stray_share),
            max_divergence=_smallest(self.max_divergence, others.max_divergence),
            max_perplexity_ratio=_smallest(self.max_perplexity_ratio, others.max_perplexity_ratio),
        )


@dataclass(frozen=True)
class LogitComparison:
    """How an artifact compares with the reference. Relative differences are root mean squares over
    that of the logits.

    typical_difference: the same without the worst `stray_share` of the positions. This is held
    against the tolerance. cached_difference: the typical one for the samples' last positions,
    reached through the KV cache. argmax_agreement: share of `positions` with the same most likely
    token. greedy_identical: how many of `greedy_tokens` generated tokens are the reference's before
    the first other one. greedy_margin: by how much the reference preferred its own token there (in
    logits, relative); None if none differs. worst: where the largest difference is, in words.
    divergence: KL(reference || artifact) of the next-token distributions, the mean over positions,
    nats; None where not all logits are known, of the runtime or of the reference. perplexity_ratio:
    the artifact's perplexity on the texts over the reference's; None where either is not known.
    """

    runtime: str
    relative_difference: float
    typical_difference: float
    cached_difference: float | None
    max_absolute_difference: float
    argmax_agreement: float
    positions: int
    greedy_tokens: int
    greedy_identical: int
    greedy_margin: float | None
    worst: str
    divergence: float | None
    perplexity_ratio: float | None
    tolerance: float | None
    min_agreement: float | None
    stray_share: float
    max_divergence: float | None
    max_perplexity_ratio: float | None

    @property
    def bounds(self) -> Bounds:
        """What it was held against."""
        return Bounds(**{field.name: getattr(self, field.name) for field in fields(Bounds)})


def _smallest(*limits: float | None) -> float | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _largest(*limits: float | None) -> float | None:
    return max((limit for limit in limits if limit is not None), default=None)
