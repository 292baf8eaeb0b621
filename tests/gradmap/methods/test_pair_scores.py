"""Scores of pairs of sublayers, with and without a shifted pair that is gone already: each against
a slow way to the same, of the whole model."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from gradmap.methods.gradmap.scores import (
    gradient_scores,
    gradient_scores_reference,
    streamed_gradient_scores,
)
from gradmap.methods.gradpruner import weight_importances
from gradmap.methods.selection import Selection, Step
from gradmap.methods.shortgpt import block_influences
from gradmap.methods.sleb import losses_without, losses_without_reference
from gradmap.methods.uidl import angular_distances
from gradmap.model.batching import Batches
from gradmap.model.corrections import Scale
from gradmap.model.sublayers import Sublayer, candidates, sublayers_left, sublayers_of
from tests.families import LAYERS
from tests.gradmap.named_methods import make_scorer
from tests.gradmap.removals import pairs
from tests.gradmap.repairs import states_between
from tests.gradmap.subjects import subject_of

SHIFTED = pairs("M0+A1")
# What could go once that is gone: the first is of two layers, and a layer of the model as it is now
BEHIND_SHIFTED = pairs("A0+M1", "M1+A2", 2, "M2+A3", 3, "M3+A4", 4)
after_removals = pytest.mark.parametrize("removed", [(), SHIFTED], ids=["whole", "shifted"])


def scores(name, pico, input_ids, removed=(), **options):
    """Of pairs."""
    scorer = make_scorer(name, subject_of(pico, input_ids, unit="pair", **options))
    so_far = Selection(tuple(Step({}, (pair,)) for pair in removed))
    return scorer.score(so_far, lambda n: None)


def pairs_left(removed):
    return candidates(sublayers_left(LAYERS, removed), "pair")


def of_parameters(model, score):
    """The sums of what `score` makes of each parameter, by the sublayer that it is of."""
    sums = dict.fromkeys(sublayers_of(range(LAYERS)), 0.0)
    for index, layer in enumerate(model.layers):
        for name, parameter in layer.named_parameters():
            sums[Sublayer(index, model.architecture.part_of(name))] += score(parameter).item()
    return sums


def summed(of_sublayers, removed):
    """The sum of both sublayers of all that could go."""
    return {
        pair: of_sublayers[pair.first] + of_sublayers[pair.second] for pair in pairs_left(removed)
    }


def turns(states, width):
    """1 - the mean cosine of hidden states that are so many sublayers apart."""
    return [
        1 - cosine_similarity(before, behind, dim=-1).mean().item()
        for before, behind in zip(states[:-width], states[width:], strict=True)
    ]


def last_angles(states, width):
    """The mean angle, over pi, of last hidden states that are so many sublayers apart."""
    return [
        cosine_similarity(before[:, -1], behind[:, -1], dim=-1).arccos().mean().item() / math.pi
        for before, behind in zip(states[:-width], states[width:], strict=True)
    ]


@after_removals
def test_gradient_scores_of_pairs_equal_the_reference(pico, input_ids, removed):
    model = pico.layered()
    with model.without(removed):
        expected = gradient_scores_reference(model, input_ids, "pair")
        of_layers = gradient_scores(model, input_ids, Batches(2))
        actual = gradient_scores(model, input_ids, Batches(2), "pair")
        streamed = streamed_gradient_scores(model, input_ids, Batches(2), [], "pair")
    assert len(expected) == len(pairs_left(removed))
    # as for layers: half the mantissa is left of the squares of ghost norms
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(streamed, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(actual[::2], of_layers, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [("M2+A3", "M0+A1"), ("M0+A1", "A0+M1"), ("M1+A2", "A1+M2")])
def test_streamed_scores_after_a_shifted_removal_go_on_from_what_stays(picos, input_ids, order):
    """Hidden states before the first layer that changed are not computed again."""
    pico, removed = picos["llama"], pairs(*order)
    scorer = make_scorer("gradient", subject_of(pico, input_ids, unit="pair", streamed=True))
    model = pico.layered()
    for number in range(len(removed) + 1):
        gone = removed[:number]
        actual = scorer.score(Selection((Step({}, gone),)), lambda n: None)
        with model.without(gone):
            expected = gradient_scores_reference(model, input_ids, "pair").tolist()
        assert actual == pytest.approx(dict(zip(pairs_left(gone), expected, strict=True)), rel=1e-7)


@after_removals
def test_block_influence_of_pairs_is_one_minus_the_mean_cosine(pico, input_ids, removed):
    expected = turns(states_between(pico.layered(), input_ids, removed), 2)
    actual = scores("block-influence", pico, input_ids, removed)
    assert tuple(actual) == (BEHIND_SHIFTED if removed else tuple(pairs_left(())))
    assert list(actual.values()) == pytest.approx(expected, rel=1e-9)


@after_removals
def test_losses_without_pairs_are_those_of_whole_smaller_models(pico, input_ids, removed):
    model = pico.layered()
    expected = {}
    for pair in pairs_left(removed):
        if {pair.first.layer, pair.second.layer}.isdisjoint({0, LAYERS - 1}):
            with model.without([*removed, pair]):
                logits = model.network(input_ids=input_ids).logits[:, :-1].flatten(end_dim=1)
            expected[pair] = cross_entropy(logits, input_ids[:, 1:].flatten()).item()
    # the loss is summed in float32
    assert scores("sleb", pico, input_ids, removed) == pytest.approx(expected, rel=1e-6)


def test_losses_without_each_pair_equal_the_reference(pico, input_ids):
    model, tried = pico.layered(), pairs_left(())
    actual = losses_without(model, input_ids, range(len(tried)), "pair")
    expected = losses_without_reference(model, input_ids, tried)
    assert actual.tolist() == pytest.approx(expected, rel=1e-6)


@after_removals
def test_taylor_scores_of_pairs_are_weights_times_gradients(pico, input_ids, removed):
    model = pico.layered()
    with model.without(removed):
        model.network.requires_grad_(True)
        logits = model.network(input_ids=input_ids).logits[:, :-1].flatten(end_dim=1)
        cross_entropy(logits, input_ids[:, 1:].flatten(), reduction="sum").backward()

    def score(weight):
        return torch.zeros(()) if weight.grad is None else (weight * weight.grad).abs().sum()

    expected = summed(of_parameters(model, score), removed)
    # the loss's own gradient is float32
    assert scores("taylor", pico, input_ids, removed) == pytest.approx(expected, rel=1e-5)


@after_removals
def test_magnitudes_of_pairs_are_sums_of_absolute_weights(pico, input_ids, removed):
    sizes = of_parameters(pico.layered(), lambda weight: weight.abs().sum())
    expected = summed(sizes, removed)
    assert scores("magnitude", pico, input_ids, removed) == pytest.approx(expected, rel=1e-12)


@after_removals
def test_importances_of_pairs_are_those_of_their_weights(pico, input_ids, removed, monkeypatch):
    monkeypatch.setattr("gradmap.methods.gradpruner.STEPS", 2)
    model, calibration = pico.layered(), subject_of(pico, input_ids).calibration
    of_weights = weight_importances(model, calibration.fit_ids, calibration.seed, range(LAYERS))
    importances = dict.fromkeys(sublayers_of(range(LAYERS)), 0.0)
    for place, importance in of_weights.items():
        part = model.architecture.part_of(place.target)
        importances[Sublayer(place.layer, part)] += importance.sum().item()
    expected = summed(importances, removed)
    assert scores("gradpruner", pico, input_ids, removed) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("removed", [SHIFTED, pairs("M2+A3", "M0+A1")], ids=str)
def test_prune_and_comp_scores_pairs_of_the_model_that_was_made_up_for(pico, input_ids, removed):
    model, fit_ids = pico.layered(), subject_of(pico, input_ids).calibration.fit_ids
    changes: dict = {}
    for number, pair in enumerate(removed):
        gone = removed[:number]
        states = states_between(model, fit_ids, gone, changes)
        place = pairs_left(gone).index(pair)
        entering, leaving = states[place], states[place + 2]
        alpha = (leaving.abs().mean(dim=1) / entering.abs().mean(dim=1)).mean()
        for sublayer in sublayers_of(range(LAYERS)):
            if sublayer > pair.second:
                at = model.output_of(sublayer)
                changes[at] = (*changes.get(at, ()), Scale(1 / alpha))
    expected = turns(states_between(model, input_ids, removed, changes), 2)
    actual = scores("prune-comp", pico, input_ids, removed)
    assert actual == pytest.approx(dict(zip(pairs_left(removed), expected, strict=True)), rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, LAYERS - 1])
@pytest.mark.parametrize("name", ["window", "uidl"])
def test_a_block_of_pairs_may_begin_at_any_sublayer(pico, input_ids, name, count):
    states = states_between(pico.layered(), input_ids)
    if name == "window":
        expected, measure = turns(states, 2 * count), block_influences
    else:
        expected, measure = last_angles(states, 2 * count), angular_distances
    actual = measure(pico.layered(), input_ids, "pair", count=count)
    assert actual.tolist() == pytest.approx(expected, rel=1e-9)
    first = expected.index(min(expected))
    block = sublayers_of(range(LAYERS))[first : first + 2 * count]
    given = scores(name, pico, input_ids, count=count)
    assert [sublayer for pair in given for sublayer in pair] == block
    assert list(given.values()) == pytest.approx([min(expected)] * count, rel=1e-9)


def test_numbers_by_chance_stay_those_of_a_pair_until_it_goes(picos, input_ids):
    before, behind = (
        scores("random", picos["llama"], input_ids, removed) for removed in ((), SHIFTED)
    )
    assert tuple(behind) == BEHIND_SHIFTED
    assert len(set(before.values())) == len(before)
    assert all(behind[pair] == before[pair] for pair in before.keys() & behind.keys())
