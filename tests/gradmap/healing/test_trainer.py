"""The parts of training that can be said in numbers."""

import pytest
import torch

from gradmap.healing.options import HealOptions
from gradmap.healing.students import with_trained
from gradmap.healing.trainer import Budget, looks_within, rate_at
from gradmap.model.corrections import LowRank, Place, Scale, Update, untrained_low_rank


def test_the_learning_rate_rises_and_falls_to_a_tenth():
    rates = [rate_at(share / 1000) for share in range(1001)]
    assert rates[0] == 0
    assert rates.index(max(rates)) == 30
    assert max(rates) == 1
    assert rates[30:] == sorted(rates[30:], reverse=True)
    # a cosine is in its middle half-way
    assert rates[515] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert rate_at(1.2) == pytest.approx(0.1)  # a budget of time is overstepped a little


@pytest.mark.parametrize(
    ("tokens", "looks"),
    [(128 * 8, 1), (37_000, 2), (600_000, 20), (150_000, 7)],
)
def test_held_out_samples_are_looked_at_for_a_tenth_of_the_work_at_most(tokens, looks):
    options = HealOptions(text=["file:a.txt"], budget_tokens=tokens)
    assert looks_within(Budget.of(options), options, 64 * 128) == looks


def factors(rank):
    generator = torch.Generator().manual_seed(rank)
    return LowRank(*(torch.randn(shape, generator=generator) for shape in ((rank, 6), (5, rank))))


def test_what_is_trained_stands_where_the_plan_had_its_like_or_last():
    first, second = Place(0, "a"), Place(1, "b")
    scale, update = Scale(torch.tensor(2.0)), Update(torch.zeros(5, 6))
    trained = {first: factors(2), second: factors(3)}
    together = with_trained({first: (factors(1), scale), second: (update,)}, trained)
    assert together[first][0] is trained[first]
    assert together[first][1] is scale
    assert together[second][0] is update
    assert together[second][1] is trained[second]


@pytest.mark.parametrize(("rank", "expected"), [(2, 4), (4, 4), (7, 7)])
def test_factors_that_go_on_from_others_change_what_those_did(rank, expected):
    known, module = factors(4), torch.nn.Linear(6, 5)
    generator = torch.Generator().manual_seed(0)
    begun = untrained_low_rank(module, rank, generator, known)
    assert begun.down.shape == (expected, 6)
    torch.testing.assert_close(begun.up @ begun.down, known.up @ known.down)
    assert begun.down.abs().sum(dim=1).min() > 0  # or the rest could never be trained
