"""The scores of `--selector repair` are divergences after a repair, measured on no more samples
than it takes."""

import math

import pytest
import torch

from gradmap.methods.compensation import run_and_capture
from gradmap.methods.least_squares import solve_ridge_reference
from gradmap.methods.repair import RepairScorer
from gradmap.methods.selection import Selection, Step
from gradmap.model.corrections import linear_output
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import LayerCall, sample_divergences_reference
from tests.conftest import CORRECTABLE, LAYERS, VOCABULARY
from tests.gradmap.subjects import subject_of


def mend_by_hand(pico, model, ids, before, wanted):
    """Least squares for the layer `before`, towards `wanted`, in the model as it is now; the hook
    that does it, which does nothing where a norm follows."""
    projection = pico.architecture.down_projection_of(before)
    if pico.architecture.uncorrectable is not None:
        return projection.register_forward_hook(lambda *args: None)
    (_, output), (_, added) = run_and_capture(LayeredModel.of(model), [before, projection], ids)
    scale = 1 / wanted.flatten(0, 1).norm(dim=1, keepdim=True)
    features = linear_output(projection, added).flatten(end_dim=-2) * scale
    missing = (wanted - output).flatten(0, 1) * scale
    lam = 0.1 * (features.square().sum() / features.shape[1]).item()
    solution = solve_ridge_reference(features, missing, lam)
    return projection.register_forward_hook(
        lambda module, args, output: output + linear_output(module, output) @ solution.mT
    )


def mean_divergence(model, ids, dense):
    return (
        sample_divergences_reference(model(input_ids=ids).logits, dense).sum().item() / ids.numel()
    )


@pytest.mark.parametrize("removed", [(), (2,), (4,), (3, 2), (3, 4)])
@pytest.mark.parametrize("family", [*CORRECTABLE, "gemma2"])
def test_repair_scores_are_divergences_after_a_repair_by_hand(
    picos, input_ids, monkeypatch, family, removed
):
    """Also in later rounds, which go on from what those before them left: a repair in front of
    which another layer may go (4), one in a layer that went itself (3, 2), and two in one layer (3,
    4)."""
    monkeypatch.setattr("gradmap.methods.racing.is_clearly_worse", lambda losses, best: False)
    pico = picos[family]
    subject = subject_of(pico, input_ids)
    model, calibration = pico.load(), subject.calibration
    layers = list(pico.architecture.layer_list(model))
    wanted = [
        output for _, output in run_and_capture(LayeredModel.of(model), layers, calibration.fit_ids)
    ]
    for number, layer in enumerate(removed):
        gone = removed[: number + 1]
        before = max(other for other in range(layer) if other not in gone)
        with LayeredModel.of(model).without(gone):
            mend_by_hand(pico, model, calibration.fit_ids, layers[before], wanted[layer])
    # where there is no repair, none is fitted on
    unseen = calibration.held_out_ids if pico.architecture.uncorrectable is None else input_ids
    dense = pico.load()(input_ids=unseen).logits
    with LayeredModel.of(model).without(removed):
        whole = mean_divergence(model, unseen, dense)
    expected = {}
    for layer in (layer for layer in range(1, LAYERS) if layer not in removed):
        before = max(other for other in range(layer) if other not in removed)
        with LayeredModel.of(model).without(sorted({*removed, layer})):
            hook = mend_by_hand(pico, model, calibration.fit_ids, layers[before], wanted[layer])
            expected[layer] = mean_divergence(model, unseen, dense) - whole
            hook.remove()
    unknown = dict.fromkeys(range(1, LAYERS), -math.inf)
    so_far = Selection(tuple(Step(unknown, (layer,)) for layer in removed))
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
    assert measured.keys() == scores.keys() == set(range(1, LAYERS))
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
    bounds = {2: -100.0, 3: 1000.0, 4: 1000.0}
    scores = RepairScorer(subject).score(
        Selection((Step({1: -1.0, **bounds}, (1,)),)), lambda n: None
    )
    assert tried == [1, 2]  # 1 was decided before; 2 is the only one that could be the best
    assert (scores[3], scores[4]) == (1000.0, 1000.0)
    assert -100 < scores[2] < 1000
