"""Dense against pruned on the same documents and segments, and whether the loss is acceptable. Pure
functions.

Both models answered the same questions, so differences are taken per document: their spread is far
smaller than that of two separate accuracies. Intervals are of the paired bootstrap (Efron and
Tibshirani 1993, chapter 8): documents are drawn again with replacement, tasks stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from gradmap.common.verdict import Judgement, Verdict, worst
from gradmap.evaluation.agreement import Followed
from gradmap.evaluation.options import QualityOptions
from gradmap.evaluation.perplexity import Estimate

CONFIDENCE = 0.95
DRAWS = 10_000
_DRAWS_AT_ONCE = 500
# Of fewer, a bootstrap knows next to nothing: one segment has an interval of no width, and of 20
# documents on which two models agree, they may still differ on every seventh (the rule of three).
LEAST_FOR_A_VERDICT = 20
# Of the bootstrap: the same measurements always give the same interval.
_SEED = 0

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """Scores (accuracies, or losses in nats per token) that dense and pruned got on the same
    documents, in the same order: (n,) each."""

    dense: Values
    pruned: Values


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskComparison:
    """A task, compared. difference: pruned minus dense accuracy. only_dense, only_pruned: documents
    that only one of them got right.

    p_value: of McNemar's exact test, that dense and pruned are equally good; None where a score is
    not right or wrong.
    """

    difference: Interval
    only_dense: int
    only_pruned: int
    p_value: float | None


@dataclass(frozen=True)
class AverageComparison:
    """The plain average accuracy over tasks, compared. difference: pruned minus dense. retained:
    pruned over dense; None where dense may be right nowhere."""

    difference: Interval
    retained: Interval | None


@dataclass(frozen=True)
class AnswersComparison:
    """How pruned follows what dense wrote to the fixed prompts (gradmap.evaluation.agreement).

    agreement: the share of the tokens of dense's greedy answers that pruned, behind the tokens
    before, finds most likely too. dense_agreement: the same of dense itself, of which rounding
    alone takes something away. divergence: mean KL of pruned from dense over these tokens, nats;
    None where logits are not to be had.
    """

    agreement: Interval
    dense_agreement: float
    divergence: Interval | None


@dataclass(frozen=True)
class QualityComparison:
    """How pruned compares with dense. tasks: name -> comparison. perplexity_ratio: name of a text
    -> pruned over dense. answers: None if none were asked for, or dense wrote nothing."""

    tasks: dict[str, TaskComparison]
    average: AverageComparison | None
    perplexity_ratio: dict[str, Interval]
    answers: AnswersComparison | None


@dataclass(frozen=True)
class Limit:
    """A limit of the gate. what: is limited to `value`, written as `form` says."""

    what: str
    value: float
    form: str


def mean_estimate(values: Values) -> Estimate:
    """Mean over documents (n,) and its standard error; None of a single one."""
    return Estimate(
        float(values.mean()),
        None if len(values) < 2 else float(values.std(ddof=1)) / len(values) ** 0.5,
    )


def average_estimate(estimates: Mapping[str, Estimate]) -> Estimate:
    """Plain average over tasks; tasks have different documents, so variances add, if all are
    known."""
    count = len(estimates)
    value = sum(estimate.value for estimate in estimates.values()) / count
    errors = [estimate.stderr for estimate in estimates.values() if estimate.stderr is not None]
    return Estimate(
        value, None if len(errors) < count else sum(error**2 for error in errors) ** 0.5 / count
    )


def compare(
    accuracies: Mapping[str, Paired],
    losses: Mapping[str, Paired],
    followed: tuple[Followed, Followed] | None = None,
) -> QualityComparison:
    """Compares pruned with dense, and gives 95% intervals.

    accuracies: task -> per document (n,); losses: text -> mean cross-entropy per segment (S,), nats
    per token. followed: how dense and pruned follow dense's answers.
    """
    # One generator for all, so that tasks are drawn independently of one another.
    generator = np.random.default_rng(_SEED)
    of_tasks = {
        name: resampled_means(paired, DRAWS, generator) for name, paired in accuracies.items()
    }
    of_texts = {name: resampled_means(paired, DRAWS, generator) for name, paired in losses.items()}
    tasks = {name: _compare_task(accuracies[name], means) for name, means in of_tasks.items()}
    ratios = {name: _perplexity_ratio(losses[name], means) for name, means in of_texts.items()}
    average = None
    if accuracies:
        average = _compare_averages(list(accuracies.values()), list(of_tasks.values()))
    answers = None if followed is None else compare_answers(*followed)
    return QualityComparison(tasks, average, ratios, answers)


def compare_answers(dense: Followed, pruned: Followed) -> AnswersComparison | None:
    """How both follow the dense model's answers; None if these have no tokens. The tokens of an
    answer depend on each other, so intervals are of answers drawn again with replacement."""
    if not len(dense.tokens):
        return None
    divergence = None
    if pruned.divergences is not None:
        divergence = _share_of_tokens(pruned.divergences, pruned.tokens)
    return AnswersComparison(
        agreement=_share_of_tokens(pruned.agreed, pruned.tokens),
        dense_agreement=float(dense.agreed.sum() / dense.tokens.sum()),
        divergence=divergence,
    )


def _share_of_tokens(sums: Values, tokens: Values) -> Interval:
    """What sums over the tokens of each answer (A,) come to per token, of all answers together."""
    generator = np.random.default_rng(_SEED)
    drawn = generator.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), size=DRAWS)
    return _interval(sums.sum() / tokens.sum(), (drawn @ sums) / (drawn @ tokens))


def resampled_means(paired: Paired, draws: int, generator: np.random.Generator) -> Values:
    """Means of dense and pruned over documents drawn again with replacement: (draws, 2).

    Equal pairs of values are drawn together: how often each occurs in a draw is multinomial.
    """
    pairs, counts = np.unique(
        np.stack([paired.dense, paired.pruned], axis=1), axis=0, return_counts=True
    )
    size = counts.sum()
    parts = [
        generator.multinomial(size, counts / size, size=min(_DRAWS_AT_ONCE, draws - start))
        @ pairs
        / size
        for start in range(0, draws, _DRAWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def resampled_means_reference(paired: Paired, draws: int, generator: np.random.Generator) -> Values:
    """`resampled_means` without its shortcut: draws (draws, n) documents one by one. For tests."""
    chosen = generator.integers(len(paired.dense), size=(draws, len(paired.dense)))
    return np.stack([paired.dense[chosen].mean(axis=1), paired.pruned[chosen].mean(axis=1)], axis=1)


def _compare_task(paired: Paired, means: Values) -> TaskComparison:
    binary = np.isin(np.concatenate([paired.dense, paired.pruned]), (0.0, 1.0)).all()
    only_dense = int((paired.dense > paired.pruned).sum())
    only_pruned = int((paired.dense < paired.pruned).sum())
    discordant = only_dense + only_pruned
    p_value = float(binomtest(only_dense, discordant).pvalue) if discordant else 1.0
    return TaskComparison(
        difference=_interval((paired.pruned - paired.dense).mean(), means[:, 1] - means[:, 0]),
        only_dense=only_dense,
        only_pruned=only_pruned,
        p_value=p_value if binary else None,
    )


def _compare_averages(tasks: Sequence[Paired], resampled: Sequence[Values]) -> AverageComparison:
    measured = np.mean([[paired.dense.mean(), paired.pruned.mean()] for paired in tasks], axis=0)
    means = np.mean(resampled, axis=0)
    return AverageComparison(
        difference=_interval(measured[1] - measured[0], means[:, 1] - means[:, 0]),
        retained=_retained(measured, means),
    )


def _perplexity_ratio(paired: Paired, means: Values) -> Interval:
    return _interval(
        np.exp((paired.pruned - paired.dense).mean()), np.exp(means[:, 1] - means[:, 0])
    )


def _retained(measured: Values, means: Values) -> Interval | None:
    """measured: (2,), means: (draws, 2), dense and pruned. None if nothing was right to begin with,
    or in a draw."""
    if not (measured[0] and means[:, 0].all()):
        return None
    return _interval(measured[1] / measured[0], means[:, 1] / means[:, 0])


def _interval(value: float, resampled: Values) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def judge_quality(
    comparison: QualityComparison,
    gate: QualityOptions,
    documents: Mapping[str, int],
    segments: Mapping[str, int],
) -> Judgement | None:
    """PASS if every whole interval is within its limit, FAIL if one is wholly beyond, else
    INCONCLUSIVE.

    documents, segments: how many there are of each task and of each text; fewer than
    LEAST_FOR_A_VERDICT are INCONCLUSIVE too. None if the gate asks for nothing.
    """
    judgements = []
    if gate.max_average_drop is not None and comparison.average is not None:
        change = comparison.average.difference
        drop = Interval(-change.value, -change.high, -change.low)
        limit = Limit("drop of the average accuracy", gate.max_average_drop, "{:.3f}")
        judgements.append(_judge(drop, limit, min(documents.values()), "documents of a task"))
    if gate.max_perplexity_ratio is not None:
        for name, ratio in comparison.perplexity_ratio.items():
            limit = Limit(f"perplexity ratio on {name}", gate.max_perplexity_ratio, "{:.2f}")
            judgements.append(_judge(ratio, limit, segments[name], "segments"))
    if not judgements:
        return None
    verdict = worst(judgement.verdict for judgement in judgements)
    return Judgement(verdict, "; ".join(judgement.reason for judgement in judgements))


def _judge(measured: Interval, limit: Limit, count: int, units: str) -> Judgement:
    """The verdict on an interval. INVALID if it is not finite: what is compared with NaN is neither
    within nor beyond."""
    bounds = (measured.value, measured.low, measured.high)
    if not all(map(math.isfinite, bounds)):
        return Judgement(Verdict.INVALID, f"{limit.what} is no finite number")
    value, low, high, limit_text = map(limit.form.format, (*bounds, limit.value))
    interval = f"{limit.what} {value}, 95% interval {low} to {high}"
    if count < LEAST_FOR_A_VERDICT:
        reason = (
            f"{interval}, but {count} {units} are too few for a verdict (it takes "
            f"{LEAST_FOR_A_VERDICT})"
        )
        return Judgement(Verdict.INCONCLUSIVE, reason)
    if measured.high <= limit.value:
        return Judgement(Verdict.PASS, f"{interval}, is within {limit_text}")
    if measured.low > limit.value:
        return Judgement(Verdict.FAIL, f"{interval}, is beyond {limit_text}")
    return Judgement(Verdict.INCONCLUSIVE, f"{interval}, contains {limit_text}")
