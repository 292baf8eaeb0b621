"""The scores of `--selector repair` are divergences after a repair, measured on no more samples
than it takes."""

import math
from contextlib import ExitStack

import pytest
import torch

from gradmap.methods.compensation import run_and_capture
from gradmap.methods.least_squares import solve_ridge_reference
from gradmap.methods.repair import RepairScorer
from gradmap.methods.selection import Selection, Step
from gradmap.model.corrections import linear_output
from gradmap.model.layerwise import LayerCall, sample_divergences_reference
from gradmap.model.sublayers import candidates, sublayers_left
from tests.conftest import CORRECTABLE, SANDWICH_NORM, make_pico
from tests.families import LAYERS, VOCABULARY
from tests.gradmap.removals import pairs
from tests.gradmap.repairs import states_behind
from tests.gradmap.subjects import subject_of


def mend_by_hand(model, ids, gone, pair, wanted):
    """Least squares for the output map before `pair`, the last of those that are gone, towards what
    followed it in the dense model, in the model as it is now; and for the gain of the norm behind
    it, if there is one. The hooks that do it, none where nothing can be fitted."""
    before = max(left for left in sublayers_left(LAYERS, gone) if left < pair.first)
    output_map, norm = model.map_at(model.output_of(before)), model.norm_behind(before)
    if not model.architecture.is_fitted:
        return ExitStack()
    with model.without(gone):
        ((_, added),) = run_and_capture(model, [output_map], ids)
    scale = 1 / wanted.flatten(0, 1).norm(dim=1, keepdim=True)
    features = linear_output(output_map, added).flatten(end_dim=-2)
    if norm is not None:
        features = features / added.flatten(end_dim=-2).square().mean(dim=1, keepdim=True).sqrt()
    missing = (wanted - states_behind(model, ids, gone)[before]).flatten(0, 1)
    lam = 0.1 * ((features * scale).square().sum() / features.shape[1]).item()
    solution = solve_ridge_reference(features * scale, missing * scale, lam)
    hooks = ExitStack()

    def change(module, args, output):
        return output + linear_output(module, output) @ solution.mT

    if norm is None:
        hooks.callback(output_map.register_forward_hook(change).remove)
        return hooks
    module = model.map_at(norm.place)
    # a large vector of ones is its own root mean square
    solution = solution / (module(torch.full_like(features[0], 1e8))[:, None])
    with model.without(gone):
        ((_, made_before),) = run_and_capture(model, [module], ids)
        hooks.callback(output_map.register_forward_hook(change).remove)
        ((_, made),) = run_and_capture(model, [module], ids)
    to_make = (missing + made_before.flatten(0, 1)) * scale
    weighted = made.flatten(0, 1) * scale
    factor = (weighted * to_make).sum(dim=0) / weighted.square().sum(dim=0)
    hook = module.register_forward_hook(lambda module, args, output: output * factor)
    hooks.callback(hook.remove)
    return hooks


def mean_divergence(model, ids, dense):
    return (
        sample_divergences_reference(model(input_ids=ids).logits, dense).sum().item() / ids.numel()
    )


ROUNDS_OF_LAYERS = [("layer", pairs(*removed)) for removed in ((), (2,), (4,), (3, 2), (3, 4))]
# After the last, M4 is behind A0, and both were repaired
ROUNDS_OF_PAIRS = [
    ("pair", pairs(*removed)) for removed in ((), ("M1+A2",), ("M2+A3", "M1+A2"), (2, "M0+A1"))
]


@pytest.mark.parametrize(("unit", "removed"), [*ROUNDS_OF_LAYERS, *ROUNDS_OF_PAIRS])
@pytest.mark.parametrize("family", [*CORRECTABLE, *SANDWICH_NORM])
def test_repair_scores_are_divergences_after_a_repair_by_hand(
    picos, input_ids, monkeypatch, family, unit, removed
):
    """Also in later rounds, which go on from what those before them left: a repair in front of
    which another layer may go (4), one in a layer that went itself (3, 2), and two in one layer (3,
    4). Of pairs: the repair of an attention, one in an attention that went itself, and of both."""
    monkeypatch.setattr("gradmap.methods.racing.is_clearly_worse", lambda losses, best: False)
    require_scores_by_hand(picos[family], input_ids, unit, removed)


def test_where_nothing_can_be_fitted_scores_are_those_of_the_removal(
    tmp_path, input_ids, monkeypatch
):
    monkeypatch.setattr("gradmap.methods.racing.is_clearly_worse", lambda losses, best: False)
    pico = make_pico("granitemoe", tmp_path)
    assert not pico.architecture.is_fitted
    require_scores_by_hand(pico, input_ids, "layer", pairs(2))


def require_scores_by_hand(pico, input_ids, unit, removed):
    subject = subject_of(pico, input_ids, unit=unit)
    model, calibration = pico.layered(), subject.calibration
    fit_ids = calibration.fit_ids
    wanted = states_behind(model, fit_ids)
    for number, pair in enumerate(removed):
        mend_by_hand(model, fit_ids, removed[: number + 1], pair, wanted[pair.second])
    # where there is no repair, none is fitted on
    unseen = calibration.held_out_ids if pico.architecture.is_fitted else input_ids
    dense = pico.load()(input_ids=unseen).logits
    with model.without(removed):
        whole = mean_divergence(model.network, unseen, dense)
    expected = {}
    _, *tried = candidates(sublayers_left(LAYERS, removed), unit)
    for pair in tried:
        gone = (*removed, pair)
        hooks = mend_by_hand(model, fit_ids, gone, pair, wanted[pair.second])
        with model.without(gone):
            expected[pair] = mean_divergence(model.network, unseen, dense) - whole
        hooks.close()
    unknown = dict.fromkeys(tried, -math.inf)
    so_far = Selection(tuple(Step(unknown, (pair,)) for pair in removed))
    scores = RepairScorer(subject).score(so_far, lambda n: None)
    # divergences are summed in float32
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_repairs_are_tried_with_fewer_samples_at_once_where_memory_runs_out(
    picos, input_ids, monkeypatch, capsys
):
    subject = subject_of(picos["llama"], input_ids)
    expected = RepairScorer(subject).score(Selection(()), lambda n: None)
    run = LayerCall.run

    def short_of_memory(self, layer, hidden):
        if len(hidden) > 1:
            raise torch.OutOfMemoryError
        return run(self, layer, hidden)

    monkeypatch.setattr(LayerCall, "run", short_of_memory)
    scores = RepairScorer(subject).score(Selection(()), lambda n: None)
    assert "going on with 1 samples at once" in capsys.readouterr().err
    # divergences are summed in float32
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_layer_that_is_clearly_worse_is_not_measured_on_all_samples(picos, monkeypatch):
    ids = torch.randint(3, VOCABULARY, (128, 12), generator=torch.Generator().manual_seed(1))
    subject = subject_of(picos["llama"], ids)
    measured = {}
    run = RepairScorer._try
    # layers of a random model are much alike
    monkeypatch.setattr("gradmap.methods.racing.CLEARLY", 0.3)

    def spy(self, layer, race):
        trial = run(self, layer, race)
        measured[layer] = len(trial.divergences)
        return trial

    monkeypatch.setattr(RepairScorer, "_try", spy)
    scores = RepairScorer(subject).score(Selection(()), lambda n: None)
    held_out = len(subject.calibration.held_out_ids)
    assert measured.keys() == scores.keys() == set(pairs(*range(1, LAYERS)))
    best = min(scores, key=scores.__getitem__)
    assert measured[best] == held_out > min(measured.values())
    for layer, count in measured.items():
        assert count == held_out or scores[layer] > scores[best]


def test_a_bound_above_the_best_is_not_tried(picos, input_ids, monkeypatch):
    subject = subject_of(picos["llama"], input_ids)
    tried = []
    fit = RepairScorer._fit
    monkeypatch.setattr(
        RepairScorer, "_fit", lambda self, layer: tried.append(layer) or fit(self, layer)
    )
    first, second, third, fourth = pairs(1, 2, 3, 4)
    bounds = {first: -1.0, second: -100.0, third: 1000.0, fourth: 1000.0}
    scores = RepairScorer(subject).score(Selection((Step(bounds, (first,)),)), lambda n: None)
    # the first was decided before; the second is the only one that could be the best
    assert tried == [first, second]
    assert (scores[third], scores[fourth]) == (1000.0, 1000.0)
    assert -100 < scores[second] < 1000
