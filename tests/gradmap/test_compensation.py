"""The closed form solves Eq. 10, and W' on a hook is what the equations say."""

import pytest
import torch

from gradmap.architectures import without_layers
from gradmap.calibration import Calibration
from gradmap.compensation import (
    accumulate_gram,
    mean_drift,
    project_most_drifted,
    pruned_and_corrected,
    pruned_loss,
    run_and_capture,
    solve_projection,
    solve_projection_reference,
)
from tests.conftest import CORRECTABLE

REMOVED = (1, 3)
LAYER = 4


@pytest.fixture(params=CORRECTABLE)
def pico(request, picos):
    return picos[request.param]


def activations(pico, model, input_ids):
    """A and T of one layer as (n, d) float64, from whole forward passes."""
    module = pico.architecture.layer_list(model)[LAYER]
    projection = pico.architecture.down_projection_of(module)
    (dense,) = run_and_capture(model, [module], input_ids)
    with without_layers(model, pico.architecture, REMOVED):
        pruned, output = run_and_capture(model, [module, projection], input_ids)
    output = output.reshape(pruned.shape)
    bias = getattr(projection, "bias", None)
    bias = 0 if bias is None else bias
    entering = pruned - output  # X_F: the residual stream that enters the FFN block
    return (output - bias).flatten(end_dim=1), (dense - entering - bias).flatten(end_dim=1)


def test_closed_form_equals_least_squares(pico, input_ids):
    model = pico.load()
    gram, cross = accumulate_gram(model, pico.architecture, input_ids, REMOVED, LAYER, batch_size=2)
    added, target = activations(pico, model, input_ids)
    lam = 0.1 * gram.diagonal().mean().item()
    # normal equations square the condition number, which lam bounds by about 10 d: 1e-16 * (240)^2, with room
    torch.testing.assert_close(
        solve_projection(gram, cross, lam), solve_projection_reference(added, target, lam), rtol=0, atol=1e-9
    )


def test_no_other_matrix_has_a_lower_objective(pico, input_ids):
    model = pico.load()
    gram, cross = accumulate_gram(model, pico.architecture, input_ids, REMOVED, LAYER, batch_size=5)
    added, target = activations(pico, model, input_ids)
    lam = 0.01 * gram.diagonal().mean().item()

    def objective(matrix):
        return (added @ matrix.mT - target).square().sum() + lam * (matrix - torch.eye(len(matrix))).square().sum()

    best = solve_projection(gram, cross, lam)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step = 1e-3 * torch.randn(best.shape, generator=generator, dtype=torch.float64)
        assert objective(best) < objective(best + step)
    assert objective(best) < objective(torch.eye(len(best), dtype=torch.float64))


def test_drift_is_the_distance_of_mean_outputs(pico, input_ids):
    model = pico.load()
    layers = list(pico.architecture.layer_list(model))
    drift = mean_drift(model, pico.architecture, input_ids, REMOVED, batch_size=2)
    assert sorted(drift) == [0, 2, 4]
    dense = run_and_capture(model, layers, input_ids)
    with without_layers(model, pico.architecture, REMOVED):
        kept = run_and_capture(model, [layers[index] for index in drift], input_ids)
    for (index, value), pruned in zip(drift.items(), kept, strict=True):
        expected = (dense[index].mean(dim=(0, 1)) - pruned.mean(dim=(0, 1))).norm().item()
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert drift[0] == 0.0  # nothing was removed before it


def test_identity_changes_nothing_and_the_hook_spares_the_bias(pico, input_ids):
    model = pico.load()
    width = len(model.get_input_embeddings().weight[0])
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    projection = pico.architecture.down_projection_of(pico.architecture.layer_list(model)[LAYER])
    bias = getattr(projection, "bias", None)
    bias = 0 if bias is None else bias
    (plain,) = run_and_capture(model, [projection], input_ids)
    with pruned_and_corrected(model, pico.architecture, (), {LAYER: torch.eye(width, dtype=torch.float64)}):
        (same,) = run_and_capture(model, [projection], input_ids)
    with pruned_and_corrected(model, pico.architecture, (), {LAYER: matrix}):
        (corrected,) = run_and_capture(model, [projection], input_ids)
    torch.testing.assert_close(same, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(corrected, (plain - bias) @ matrix.mT + bias, rtol=1e-10, atol=1e-10)


def test_the_correction_is_chosen_and_judged_on_held_out_samples(pico, input_ids):
    model = pico.load()
    calibration = Calibration("test", 0, input_ids.repeat(2, 1))
    compensation = project_most_drifted(model, pico.architecture, calibration, REMOVED, batch_size=4)
    (correction,) = compensation.corrections
    assert correction.layer == max(compensation.drift, key=compensation.drift.get)
    held_out = calibration.held_out_ids
    before = pruned_loss(model, pico.architecture, held_out, REMOVED, {}, batch_size=3)
    after = pruned_loss(
        model, pico.architecture, held_out, REMOVED, {correction.layer: correction.matrix}, batch_size=3
    )
    assert correction.held_out_loss_before == pytest.approx(before, rel=1e-9)
    assert correction.held_out_loss_after == pytest.approx(after, rel=1e-9)
    assert correction.accepted == (after < before)
