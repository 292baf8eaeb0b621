"""Where an RMS norm follows a map, the map's direction and the norm's gain are fitted together."""

from dataclasses import replace

import pytest
import torch

from gradmap.methods.compensation import Compensation
from gradmap.methods.features import Fit, Walks, accumulate_gram
from gradmap.methods.least_squares import solve_ridge_reference
from gradmap.methods.normed import fit_gain
from gradmap.methods.ridge import NORMED_LAMBDAS, fit_correction
from gradmap.methods.sequential import refit_around_runs
from gradmap.model.corrections import Gain, Update
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_model
from tests.conftest import SANDWICH_NORM
from tests.gradmap.removals import attention, ffn, pairs
from tests.gradmap.repairs import prune, states_behind

# An FFN and an attention before a cut.
CUTS = ((ffn(1), pairs(2)), (attention(1), pairs("M1+A2")))


@pytest.fixture(params=SANDWICH_NORM)
def pico(request, picos):
    return picos[request.param]


def seen(pruned, sublayer, changes=None):
    """Of all samples to fit on: what enters the map (n, k), what it gives, what the norm makes of
    that, and what it ought to make (n, d); by whole passes."""
    model, ids = pruned.model, pruned.calibration.fit_ids
    place, norm = model.output_of(sublayer), model.norm_behind(sublayer)
    target = states_behind(model, ids)[pruned.runs()[0].last]
    captured = {}

    def note(module, args, output):
        captured[module] = (args[0].flatten(end_dim=-2), output.flatten(end_dim=-2))

    modules = [model.map_at(place), model.map_at(norm.place)]
    hooks = []
    with model.changed(changes or {}):
        hooks = [module.register_forward_hook(note) for module in modules]
        given = states_behind(model, ids, pruned.removed, changes)[sublayer]
    for hook in hooks:
        hook.remove()
    (inputs, output), (_, made) = (captured[module] for module in modules)
    return inputs, output, made, (target - given).flatten(end_dim=-2) + made


@pytest.mark.parametrize(("sublayer", "removed"), CUTS)
@pytest.mark.parametrize("kind", ["left", "refit"])
def test_the_map_is_fitted_with_every_root_mean_square_held(
    pico, input_ids, sublayer, removed, kind
):
    pruned = prune(pico, input_ids, removed=removed)
    fit = Fit(sublayer, pruned.runs()[0].last, kind)
    gram, cross = accumulate_gram(pruned, fit, {})
    inputs, output, made, wanted = seen(pruned, sublayer)
    scale = output.square().mean(dim=-1, keepdim=True).sqrt()
    features = (inputs if kind == "refit" else output) / scale
    # sums of n tokens of products of order one
    torch.testing.assert_close(gram, features.mT @ features, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(cross, (wanted - made).mT @ features, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize(("sublayer", "removed"), CUTS)
def test_the_gain_is_that_of_least_squares_in_each_channel(pico, input_ids, sublayer, removed):
    pruned = prune(pico, input_ids, removed=removed)
    fit, walks = Fit(sublayer, pruned.runs()[0].last, "refit"), Walks.start(pruned)
    accumulate_gram(pruned, fit, {}, walks)
    norm = pruned.model.norm_behind(sublayer)
    place, gain = fit_gain(pruned, fit, norm, {}, walks)
    *_, made, wanted = seen(pruned, sublayer)
    assert place == norm.place
    for channel in range(made.shape[1]):
        (expected,) = solve_ridge_reference(made[:, [channel]], wanted[:, [channel]], 0.0)
        assert gain.factor[channel].item() == pytest.approx(expected.item(), rel=1e-8)


def test_both_are_judged_together(pico, input_ids):
    pruned = prune(pico, input_ids)
    fit = Fit(ffn(0), ffn(1), "refit", weighted=True)
    made = fit_correction(pruned, fit, {}, (0.1,))
    assert [type(correction.change) for correction in made] == [Update, Gain]
    (before,) = {correction.held_out_divergence_before for correction in made}
    (after,) = {correction.held_out_divergence_after for correction in made}
    assert after < before
    assert after == pytest.approx(pruned.divergence(Compensation(made).changes), rel=1e-9)


def test_of_all_lambdas_the_one_with_the_lowest_divergence_is_taken(pico, input_ids):
    pruned = prune(pico, input_ids)
    fit = Fit(ffn(0), ffn(1), "refit", weighted=True)
    alone = [fit_correction(pruned, fit, {}, (relative,))[0] for relative in NORMED_LAMBDAS]
    chosen, _ = fit_correction(pruned, fit, {}, NORMED_LAMBDAS)
    lowest = min(one.held_out_divergence_after or 0.0 for one in alone)
    assert chosen.held_out_divergence_after == pytest.approx(lowest, rel=1e-9)


def test_a_channel_without_a_gain_is_left_alone(pico, input_ids):
    pruned = prune(pico, input_ids)
    norm = pruned.model.norm_behind(ffn(0))
    with torch.no_grad():
        pruned.model.map_at(norm.place).weight[3] = -norm.offset
    made = fit_correction(pruned, Fit(ffn(0), ffn(1), "refit"), {}, (0.1,))
    update, gain = (correction.change for correction in made)
    assert isinstance(update, Update) and not update.matrix[3].any()
    assert isinstance(gain, Gain) and gain.factor[3] == 1


def test_a_model_of_which_one_layer_is_in_memory_is_fitted_the_same(pico, input_ids):
    whole = prune(pico, input_ids)
    network = load_model(pico.checkpoint, "float64", "cpu", streamed=True)
    streamed = replace(whole, model=LayeredModel.of(network))
    both = [refit_around_runs(each).corrections for each in (whole, streamed)]
    for one, other in zip(*both, strict=True):
        assert one.place == other.place
        for name, tensor in one.change.tensors.items():
            torch.testing.assert_close(other.change.tensors[name], tensor, rtol=1e-9, atol=1e-9)


def test_repairs_around_runs_come_in_twos(pico, input_ids):
    pruned = prune(pico, input_ids)
    made = refit_around_runs(pruned).corrections
    assert [type(correction.change) for correction in made[:2]] == [Update, Gain]
    assert refit_around_runs(pruned).held_out_divergence <= pruned.divergence({})
