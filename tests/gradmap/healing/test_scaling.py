"""What more tokens would bring, against laws that are known."""

import math

import numpy as np
import pytest

from gradmap.healing import scaling
from gradmap.healing.scaling import LAW_ERROR, SCATTER, SCATTER_LOOKS, forecasts
from gradmap.healing.summary import summarise
from gradmap.healing.trainer import LAST_RATE, rate_at
from gradmap.pruning.plan import HealingPoint, HealingRecord

TOKENS = 200_000


def curve_of(divergences):
    """Looks that are as far from each other."""
    last = len(divergences) - 1
    return [
        HealingPoint(
            tokens=round(TOKENS * number / last),
            seconds=1.0,
            training_divergence=None,
            held_out_divergence=divergence,
        )
        for number, divergence in enumerate(divergences)
    ]


def law_reference(shape, area, rate):
    """The law of the module's docstring, for one look and one shape."""
    floor, offset, exponent, annealing = shape
    power = ((area + offset) / (1 + offset)) ** -exponent
    return (floor + (1 - floor) * power) * (1 + annealing * (rate - LAST_RATE))


def divergences_of(shape, looks, scale=1.0):
    shares = [look / looks for look in range(looks + 1)]
    areas = [scaling._area(share) / scaling._area(1.0) for share in shares]
    rates = [LAST_RATE, *map(rate_at, shares[1:])]
    at_looks = zip(areas, rates, strict=True)
    return [scale * law_reference(shape, area, rate) for area, rate in at_looks]


def test_the_area_is_that_under_the_rate():
    for share in (0.01, 0.03, 0.4, 1.0):
        edges = np.linspace(0, share, 20_001)
        heights = [rate_at(edge) for edge in edges]
        # of 200 middles, each is off by a twelfth of its width squared, times the second derivative
        # (below 50); and where the warm-up ends, half of one width by the change of slope
        width = share / 200
        error = share * 50 * width**2 / 12 + width**2 / 0.03
        assert scaling._area(share) == pytest.approx(np.trapezoid(heights, edges), abs=error)


def test_shapes_are_computed_as_the_law_says():
    shapes = scaling._Shapes.grid()
    areas, rates = np.array([0.0, 0.3, 1.0, 4.0]), np.array([LAST_RATE, 1.0, 0.5, LAST_RATE])
    found = shapes.logarithms(areas, rates)
    for number in range(0, found.shape[1], 5_003):
        shape = (
            shapes.floor[number],
            shapes.offset[number],
            shapes.exponent[number],
            shapes.annealing[number],
        )
        for look, (area, rate) in enumerate(zip(areas, rates, strict=True)):
            expected = math.log(law_reference(shape, area, rate))
            assert found[look, number] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 4.0])
@pytest.mark.parametrize(
    "shape",
    [(0.2, 0.1, 0.5, 0.1), (0.7, 0.03, 0.8, 0.0), (0.5, 1.0, 0.9, 0.2), (0.05, 0.05, 0.2, 0.3)],
)
def test_a_law_is_found_in_its_points(shape, scale):
    """Looks without scatter leave no more doubt than runs have about the law."""
    found = forecasts(curve_of(divergences_of(shape, looks=20, scale=scale)))
    assert [forecast.times for forecast in found] == [2, 4]
    for forecast in found:
        expected = scale * law_reference(shape, float(forecast.times), LAST_RATE)
        doublings = math.log2(forecast.times)
        assert abs(math.log(forecast.divergence / expected)) < LAW_ERROR * doublings
        # 1.64 standard deviations either way of the law's error alone, and not twice as many
        least = 2 * 1.64 * LAW_ERROR * doublings
        assert 0.97 * least < _width(forecast) < 2 * least


def test_intervals_cover_as_often_as_they_say():
    """Of runs as the prior has them: laws of the grid, with scatter, that end as far from it as its
    error says. Cook et al. 2006, 10.1198/106186006X136976."""
    generator, shapes = np.random.default_rng(5), scaling._Shapes.grid()
    covered: list[bool] = []
    while len(covered) < 120:
        number = generator.integers(len(shapes.floor))
        shape = [axis[number] for axis in vars(shapes).values()]
        scatter = SCATTER * math.sqrt(SCATTER_LOOKS / generator.chisquare(SCATTER_LOOKS))
        noise = np.exp(scatter * generator.standard_normal(9))
        for forecast in forecasts(curve_of(list(divergences_of(shape, looks=8) * noise)))[:1]:
            apart = math.hypot(scatter, LAW_ERROR) * generator.standard_normal()
            end = law_reference(shape, 2.0, LAST_RATE) * math.exp(apart)
            covered.append(forecast.low <= end <= forecast.high)
    # three standard deviations of a binomial
    error = 3 * math.sqrt(0.9 * 0.1 / len(covered))
    assert np.mean(covered) == pytest.approx(0.9, abs=error)


@pytest.mark.parametrize(
    "divergences",
    [
        [0.3, 0.25, 0.22, 0.2],  # three looks
        [0.3, 0.3, 0.3, 0.3, 0.3, 0.3],  # flat
        [0.3, 0.4, 0.5, 0.6, 0.7, 0.8],  # worse and worse
        [0.3, 0.2, 0.1, 0.01, 0.0, 0.0],  # nothing is left
    ],
)
def test_where_nothing_can_be_said_nothing_is(divergences):
    assert forecasts(curve_of(divergences)) == []


@pytest.mark.parametrize(
    "divergences",
    [
        [0.3, 0.29999, 0.29998, 0.29997, 0.29996],
        [0.3, 0.8, 0.1, 0.9, 0.2, 0.29],
        [9.0, 1e-6, 1e-6, 1e-6, 1e-6],
        [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125],
    ],
)
def test_other_curves_give_no_nonsense(divergences):
    for forecast in forecasts(curve_of(divergences)):
        assert 0 < forecast.low < forecast.divergence < forecast.high < math.inf


def test_what_scatters_says_less():
    smooth = divergences_of((0.5, 0.1, 0.5, 0.1), looks=6)
    rough = [one * (1.2 if look % 2 else 1) for look, one in enumerate(smooth)]
    of_smooth, of_rough = (_width(forecasts(curve_of(curve))[0]) for curve in (smooth, rough))
    assert of_rough > 1.5 * of_smooth


def _width(forecast):
    return math.log(forecast.high / forecast.low)


def test_few_looks_leave_more_doubt_than_many():
    few, many = (
        forecasts(curve_of(divergences_of((0.5, 0.1, 0.5, 0.1), looks)))[0] for looks in (4, 20)
    )
    assert _width(few) > 1.2 * _width(many)


def test_what_is_flat_is_expected_to_stay_so():
    """Within the law's error."""
    (twice, _) = forecasts(curve_of([0.3, 0.29999, 0.29998, 0.29997, 0.29996]))
    assert abs(math.log(twice.divergence / 0.3)) < LAW_ERROR


def test_a_fall_at_the_end_that_the_rate_explains_is_not_expected_to_go_on():
    """Of two curves with the same ends, the one that fell early and then with the rate is nearer
    its floor."""
    falling = divergences_of((0.1, 0.5, 0.5, 0.0), looks=20)
    with_the_rate = divergences_of((0.9, 0.02, 1.0, 0.3), looks=20)
    steady, settled = (
        forecasts(curve_of(curve))[0].divergence / curve[-1] for curve in (falling, with_the_rate)
    )
    assert steady < 0.9 < settled


def test_the_summary_has_a_row_for_each():
    curve = curve_of(divergences_of((0.2, 0.1, 0.5, 0.1), looks=8, scale=0.3))
    record = HealingRecord(recipe={}, samples=1, bos=None, sha256="", passes={}, curve=curve)
    rows = dict(summarise(record, forecasts(curve)))
    twice, four_times = forecasts(curve)
    assert rows["twice the tokens"] == (
        f"{twice.divergence:#.3g} ({twice.low:#.3g}-{twice.high:#.3g})"
    )
    assert rows["four times the tokens"] == four_times.describe()
    few = record.model_copy(update={"curve": curve[:3]})
    assert "twice the tokens" not in dict(summarise(few, forecasts(few.curve)))
