"""Paired statistics from known outcomes, and the verdicts of the gate."""

from math import comb

import numpy as np
import pytest

from gradmap.common.verdict import Verdict, worst
from gradmap.evaluation.comparison import (
    DRAWS,
    LEAST_FOR_A_VERDICT,
    Paired,
    average_estimate,
    compare,
    judge_quality,
    mean_estimate,
    resampled_means,
    resampled_means_reference,
)
from gradmap.evaluation.options import QualityOptions
from gradmap.evaluation.perplexity import Estimate


def outcomes(both, only_dense, only_pruned, neither):
    dense = [1.0] * (both + only_dense) + [0.0] * (only_pruned + neither)
    pruned = [1.0] * both + [0.0] * only_dense + [1.0] * only_pruned + [0.0] * neither
    return Paired(np.array(dense), np.array(pruned))


def test_an_accuracy_has_the_standard_error_of_a_mean():
    estimate = mean_estimate(np.array([1.0] * 30 + [0.0] * 70))
    assert estimate.value == pytest.approx(0.3)
    assert estimate.stderr == pytest.approx((0.3 * 0.7 / 99) ** 0.5)
    average = average_estimate({"a": Estimate(0.2, 0.03), "b": Estimate(0.4, 0.04)})
    assert average.value == pytest.approx(0.3)
    assert average.stderr == pytest.approx(0.025)


@pytest.mark.parametrize("resample", [resampled_means, resampled_means_reference])
def test_resampling_has_the_moments_of_the_bootstrap(resample):
    """Means over n documents drawn again: expectation the sample's mean, covariance the sample's
    over n."""
    generator = np.random.default_rng(1)
    paired = Paired(generator.integers(0, 2, 200).astype(float), generator.normal(size=200))
    means = resample(paired, DRAWS, np.random.default_rng(2))
    assert means.shape == (DRAWS, 2)
    expected = np.cov(paired.dense, paired.pruned, ddof=0) / 200
    five_sigma = 5 / DRAWS**0.5  # of the estimates from DRAWS draws, in units of what they estimate
    deviations = means.mean(axis=0) - [paired.dense.mean(), paired.pruned.mean()]
    assert np.abs(deviations / np.sqrt(np.diag(expected))).max() < five_sigma
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs((np.cov(means.T) - expected) / scale).max() < five_sigma * 2**0.5


def test_a_task_is_compared_document_by_document():
    comparison = compare({"task": outcomes(50, 30, 10, 10)}, {})
    task = comparison.tasks["task"]
    assert task.difference.value == pytest.approx(-0.2)
    assert (task.only_dense, task.only_pruned) == (30, 10)
    # McNemar's exact test: 2 * P(Binomial(40, 1/2) <= 10)
    assert task.p_value == pytest.approx(2 * sum(comb(40, wins) for wins in range(11)) / 2**40)
    # standard deviation of differences: sqrt(0.4 - 0.04) over sqrt(100), so about 0.06 either side
    # times 1.96
    assert task.difference.low == pytest.approx(-0.2 - 1.96 * 0.06, abs=0.01)
    assert task.difference.high == pytest.approx(-0.2 + 1.96 * 0.06, abs=0.01)


def test_the_same_model_differs_by_nothing():
    comparison = compare(
        {"task": outcomes(50, 0, 0, 50)},
        {"text": Paired(np.array([1.0, 2.0]), np.array([1.0, 2.0]))},
    )
    task = comparison.tasks["task"]
    assert (task.difference.value, task.difference.low, task.difference.high, task.p_value) == (
        0,
        0,
        0,
        1.0,
    )
    assert comparison.average.retained.value == comparison.average.retained.low == 1
    assert comparison.perplexity_ratio["text"].high == 1


def test_the_average_weighs_tasks_equally_and_draws_them_independently():
    small, large = outcomes(50, 20, 10, 20), outcomes(500, 200, 100, 200)
    average = compare({"small": small, "large": large}, {}).average
    assert average.difference.value == pytest.approx(-0.1)
    assert average.retained.value == pytest.approx(0.6 / 0.7)
    # variances of the two mean differences, 0.29 / 100 and 0.29 / 1000, over 4
    sigma = (0.29 / 100 + 0.29 / 1000) ** 0.5 / 2
    assert average.difference.high - average.difference.low == pytest.approx(
        2 * 1.96 * sigma, rel=0.05
    )


def test_of_one_document_there_is_no_standard_error():
    one, many = mean_estimate(np.array([1.0])), mean_estimate(np.array([1.0, 0.0]))
    assert one == Estimate(1.0, None)
    assert average_estimate({"one": one, "many": many}) == Estimate(0.75, None)


@pytest.mark.parametrize("dense", [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
def test_of_what_may_be_nothing_no_share_is_retained(dense):
    average = compare({"task": Paired(np.array(dense), np.array([0.0, 1.0, 0.0]))}, {}).average
    assert average.retained is None
    assert np.isfinite(
        [average.difference.value, average.difference.low, average.difference.high]
    ).all()


def test_the_perplexity_ratio_follows_from_paired_losses():
    generator = np.random.default_rng(3)
    dense = generator.normal(3, 0.5, 400)
    rise = generator.normal(np.log(2), 0.1, 400)
    ratio = compare({}, {"text": Paired(dense, dense + rise)}).perplexity_ratio["text"]
    assert ratio.value == pytest.approx(np.exp(rise.mean()))
    margin = 1.96 * rise.std() / 20  # of the log; the spread of the texts themselves does not enter
    assert np.log(ratio.high / ratio.low) == pytest.approx(2 * margin, rel=0.05)


@pytest.mark.parametrize(
    ("gate", "verdict"),
    [
        (QualityOptions(), None),
        (QualityOptions(max_average_drop=0.35), Verdict.PASS),
        (QualityOptions(max_average_drop=0.05), Verdict.FAIL),
        (QualityOptions(max_average_drop=0.2), Verdict.INCONCLUSIVE),
        (QualityOptions(max_perplexity_ratio=1.5), Verdict.FAIL),
        (QualityOptions(max_perplexity_ratio=2.5), Verdict.PASS),
        (QualityOptions(max_average_drop=0.2, max_perplexity_ratio=1.5), Verdict.FAIL),
        (QualityOptions(max_average_drop=0.35, max_perplexity_ratio=2.5), Verdict.PASS),
    ],
)
def test_the_gate_looks_at_whole_intervals(gate, verdict):
    dense = np.linspace(2, 4, 50)
    comparison = compare(
        {"task": outcomes(50, 30, 10, 10)}, {"text": Paired(dense, dense + np.log(2))}
    )
    judgement = judge_quality(comparison, gate, {"task": 100}, {"text": 50})
    assert (judgement and judgement.verdict) == verdict
    if verdict is Verdict.INCONCLUSIVE:
        assert judgement.reason.startswith("drop of the average accuracy 0.200, 95% interval 0.0")


@pytest.mark.parametrize(
    "gate", [QualityOptions(max_average_drop=1.0), QualityOptions(max_perplexity_ratio=1000.0)]
)
@pytest.mark.parametrize("agree", [True, False])
def test_a_handful_of_documents_proves_nothing(gate, agree):
    """One document, or some on which the models agree, have an interval of no width: all of it is
    within any limit."""

    def judged(count):
        same = np.zeros(count)
        paired = Paired(
            same, same if agree else same + np.log(2000) * (gate.max_average_drop is None)
        )
        return judge_quality(
            compare({"task": paired}, {"text": paired}), gate, {"task": count}, {"text": count}
        )

    for count in (1, 2, LEAST_FOR_A_VERDICT - 1):
        judgement = judged(count)
        assert judgement.verdict is Verdict.INCONCLUSIVE
        assert (
            f"but {count} " in judgement.reason
            and "too few for a verdict (it takes 20)" in judgement.reason
        )
    assert judged(LEAST_FOR_A_VERDICT).verdict in (Verdict.PASS, Verdict.FAIL)


def test_the_smallest_of_the_tasks_decides_whether_there_are_enough_documents():
    comparison = compare({"large": outcomes(500, 0, 0, 0), "small": outcomes(5, 0, 0, 0)}, {})
    judgement = judge_quality(
        comparison, QualityOptions(max_average_drop=0.1), {"large": 500, "small": 5}, {}
    )
    assert judgement.verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_invalid(loss):
    dense = np.linspace(2, 4, 50)
    pruned = np.where(np.arange(50) == 7, loss, dense)
    with np.errstate(all="ignore"):
        comparison = compare({}, {"text": Paired(dense, pruned)})
    judgement = judge_quality(
        comparison, QualityOptions(max_perplexity_ratio=2.0), {}, {"text": 50}
    )
    assert (judgement.verdict, judgement.reason) == (
        Verdict.INVALID,
        "perplexity ratio on text is no finite number",
    )


def test_a_missed_gate_outweighs_everything():
    assert worst([Verdict.PASS, Verdict.INVALID, Verdict.FAIL]) is Verdict.FAIL
    assert worst([Verdict.PASS, Verdict.INVALID, Verdict.INCONCLUSIVE]) is Verdict.INVALID
    assert worst([Verdict.PASS]) is Verdict.PASS
