"""Adam trains what the closed form solves for, by the published objective and rate."""

from dataclasses import replace

import pytest
import torch

from gradmap.methods.features import Fit, accumulate_gram
from gradmap.methods.gradmap.adam import errors_of_output, objective, train_projection
from gradmap.methods.least_squares import solve_ridge
from gradmap.methods.ridge import REGULARISATION
from tests.conftest import inside
from tests.gradmap.named_methods import repair
from tests.gradmap.removals import ffn
from tests.gradmap.repairs import LAYER, activations, prune


def test_the_closed_form_is_below_what_adam_reaches(picos, input_ids):
    pruned = prune(picos["llama"], input_ids)
    gram, cross = accumulate_gram(pruned, Fit(ffn(LAYER), ffn(LAYER)), {})
    features, missing = (
        tensor.reshape(*input_ids.shape, -1) for tensor in activations(pruned, refit=False)
    )
    exact = solve_ridge(gram, cross, REGULARISATION * missing.numel())
    training = train_projection(
        torch.zeros_like(exact),
        errors_of_output(features, missing),
        len(input_ids),
        epochs=30,
        seed=0,
    )
    values = [objective(update, features @ update.mT - missing).item() for update in training]
    best = objective(exact, features @ exact.mT - missing)
    assert best < values[-1] < values[0] < missing.square().mean()


def test_adam_steps_at_the_published_rate():
    """Its first step moves every weight by the rate, whatever the gradient."""
    generator = torch.Generator().manual_seed(0)
    added, missing = (
        torch.randn(1, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    start = torch.zeros(4, 4, dtype=torch.float64)
    (update,) = train_projection(
        start, errors_of_output(added, missing), samples=1, epochs=1, seed=0
    )
    # Adam's epsilon
    torch.testing.assert_close(update.abs(), torch.full_like(update, 1e-3), rtol=1e-4, atol=0)


def test_the_objective_is_eq_11_as_a_mean_and_a_thousandth_of_eq_12():
    update = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    errors = torch.full((3, 5, 2), 2.0, dtype=torch.float64)
    assert objective(update, errors).item() == pytest.approx(4 + 1e-3 * 30, rel=1e-12)


def test_adam_trains_in_float32_whatever_the_model_is_in(picos, input_ids):
    exact = prune(picos["llama"], input_ids)
    coarse = replace(exact, model=picos["llama"].layered(torch.bfloat16))
    (correction,) = repair("projection-adam", coarse).corrections
    matrix = inside(correction).matrix
    # a step of 1e-3 is below half of bfloat16's spacing beside one: there, W' could not move off
    # the diagonal's 1
    assert not torch.equal(matrix.bfloat16().double(), matrix)


def test_adam_repairs_the_layer_that_the_closed_form_repairs(picos, input_ids):
    pruned = prune(picos["llama"], input_ids)
    (trained,), (exact,) = (
        repair(name, pruned).corrections for name in ("projection-adam", "projection")
    )
    assert trained.place == exact.place
    assert trained.held_out_divergence_before == pytest.approx(
        exact.held_out_divergence_before, rel=1e-12
    )
