"""A race gives up what is clearly worse, and only that."""

import math

import pytest
import torch

from gradmap.methods.racing import CLEARLY, MAY_FALL, Race, is_clearly_worse, laps
from gradmap.model.sublayers import Pair
from tests.gradmap.removals import pairs

SAMPLES = 32


def noise(seed, size=SAMPLES, scale=1.0):
    return scale * torch.randn(
        size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_laps_are_all_samples_once():
    for samples, length in ((32, 4), (5, 4), (3, 16)):
        seen = [index for lap in laps(samples, length) for index in range(samples)[lap]]
        assert seen == list(range(samples))
    assert [lap.stop - lap.start for lap in laps(10, 4)] == [4, 4, 2]


def test_clearly_worse_is_a_mean_difference_of_so_many_standard_errors():
    best, measured = noise(1), 8
    spread = torch.tensor([1.0, -1.0] * (measured // 2), dtype=torch.float64)
    error = float(spread.std()) * math.sqrt(1 / measured - 1 / SAMPLES)
    for factor, expected in ((0.99, False), (1.01, True)):
        assert (
            is_clearly_worse(best[:measured] + spread + factor * CLEARLY * error, best) is expected
        )
        # better is not worse
        assert not is_clearly_worse(best[:measured] + spread - factor * CLEARLY * error, best)


def test_what_all_samples_share_does_not_count():
    """Samples differ far more than layers: pairs see a difference that means do not."""
    samples = noise(2, scale=10.0)
    best, worse = samples + noise(3, scale=0.01), samples + 0.1 + noise(4, scale=0.01)
    assert is_clearly_worse(worse[:4], best)


def test_one_sample_or_all_of_them_decide_nothing():
    best = noise(5)
    assert not is_clearly_worse(best[:1] + 100, best)
    # all were measured: the means themselves are compared
    assert not is_clearly_worse(best + 100, best)


def test_equals_are_given_up_hardly_ever():
    """Of 4 samples, with t's 3 degrees of freedom: P(t > 3 sqrt(1 - 4 / 32)) = 3.4%."""
    lost = [is_clearly_worse(noise(seed, 4), noise(10**6 + seed)) for seed in range(2000)]
    # of 2000, three standard deviations of the binomial
    assert sum(lost) / 2000 == pytest.approx(0.034, abs=3 * math.sqrt(0.034 * 0.966 / 2000))


def test_the_leader_is_the_lowest_mean_of_all_samples():
    race, losses = Race(SAMPLES), noise(6)
    assert race.best_mean == math.inf
    assert race.enter(losses) == pytest.approx(float(losses.mean()))
    # measured on all, and worse
    assert race.enter(losses + 1) == pytest.approx(float(losses.mean()) + 1)
    assert race.best_mean == pytest.approx(float(losses.mean()))
    # not measured on all: does not lead
    assert race.enter(losses[:4] - 1) == pytest.approx(float(losses.mean()) - 1)
    assert race.best_mean == pytest.approx(float(losses.mean()))
    assert race.enter(losses - 0.5) == race.best_mean == pytest.approx(float(losses.mean()) - 0.5)


def test_what_is_given_up_is_estimated_by_its_difference_on_the_first_samples():
    race, best = Race(SAMPLES), torch.arange(SAMPLES, dtype=torch.float64)
    race.enter(best)
    # not the mean of the first four
    assert race.enter(best[:4] + 2) == pytest.approx(float(best.mean()) + 2)


@pytest.mark.parametrize(
    ("base", "before", "tried"),
    [
        (0.0, {1: 1.0, 2: 0.99 / (1 - MAY_FALL), 3: 1.01 / (1 - MAY_FALL)}, [1, 2]),
        # the model gets better without them
        (2.0, {1: -1.0, 2: -0.99 / (1 + MAY_FALL), 3: -0.5}, [1]),
        (2.0, {1: -1.0, 2: -1.0, 3: -1.01 / (1 + MAY_FALL)}, [1, 2, 3]),
        (0.0, {1: -math.inf, 2: -math.inf, 3: -math.inf}, [1, 2, 3]),  # nothing is known
    ],
)
def test_what_may_have_become_the_cheapest_is_tried_again(base, before, tried):
    """All cost 1 now, in a model whose loss was `base`."""
    measured = []

    def measure(group):
        measured.extend(group)
        return [torch.ones(SAMPLES, dtype=torch.float64) for _ in group]

    before, tried = {Pair.of_layer(layer): cost for layer, cost in before.items()}, pairs(*tried)
    costs = Race(SAMPLES).run(pairs(1, 2, 3), before, base, measure)
    assert tuple(measured) == tried
    assert costs == {layer: 1 - base if layer in tried else before[layer] for layer in before}
    assert min(costs, key=costs.__getitem__) in tried
