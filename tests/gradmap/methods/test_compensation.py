"""The closed form solves Eq. 10, changes on hooks are what the equations say, and no repair makes
anything worse."""

import math
from dataclasses import replace

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.data.calibration import Calibration, build_calibration
from gradmap.methods.compensation import Compensation, Pruned, run_and_capture
from gradmap.methods.features import Fit, accumulate_gram, device_with_room
from gradmap.methods.gradmap.projection import mean_drift, project_most_drifted
from gradmap.methods.least_squares import ridge_sums, solve_ridge, solve_ridge_reference
from gradmap.methods.ridge import best_downhill
from gradmap.model.batching import Batches
from gradmap.model.corrections import Place, Projection, linear_output
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import sample_divergences_reference
from gradmap.model.loading import load_model, load_tokenizer
from tests.conftest import BOOLQ, CORRECTABLE, inside
from tests.gradmap.named_methods import repair
from tests.gradmap.removals import ffn, pairs
from tests.gradmap.repairs import LAYER, REMOVED, activations, prune


@pytest.fixture(params=CORRECTABLE)
def pico(request, picos):
    return picos[request.param]


@pytest.mark.parametrize("kind", ["left", "refit"])
@pytest.mark.parametrize("weighted", [False, True])
def test_closed_form_equals_least_squares(pico, input_ids, kind, weighted):
    pruned = prune(pico, input_ids)
    gram, cross = accumulate_gram(pruned, Fit(ffn(LAYER), ffn(LAYER), kind, weighted), {})
    features, missing = activations(pruned, refit=kind == "refit")
    if weighted:
        ((_, dense),) = run_and_capture(
            pruned.model,
            [pruned.model.layers[LAYER]],
            pruned.calibration.fit_ids,
        )
        scale = 1 / dense.flatten(end_dim=-2).norm(dim=1, keepdim=True)
        features, missing = features * scale, missing * scale
    lam = 0.1 * gram.diagonal().mean().item()
    # normal equations square the condition number, which lam bounds by about 10 f: 1e-16 * (400)^2,
    # with room
    torch.testing.assert_close(
        solve_ridge(gram, cross, lam),
        solve_ridge_reference(features, missing, lam),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_lowest_of_losses_that_fall_and_then_rise_is_found_without_trying_all(count):
    values = range(count)
    for lowest in values:
        tried: list = []

        def attempt(value, tried=tried):
            tried.append(value)
            return value

        losses = {value: float(abs(value - lowest)) for value in values}
        assert best_downhill(values, attempt, loss=losses.__getitem__) == lowest
        assert len(tried) == len(set(tried)) <= max(3, abs(lowest - count // 2) + 3)


def test_a_loss_that_is_not_a_number_is_not_the_lowest():
    losses = {0: 1.0, 1: 2.0, 2: math.nan}
    assert best_downhill(list(losses), attempt=int, loss=losses.__getitem__) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["left", "refit"])
def test_a_gpu_fits_the_same(picos, input_ids, kind):
    pico, fit = picos["llama"], Fit(ffn(LAYER), ffn(LAYER), kind, weighted=True)
    of_cpu = prune(pico, input_ids)
    of_gpu = replace(of_cpu, model=load_model(pico.checkpoint, "float64", "cuda"))
    (gram, cross), (expected_gram, expected_cross) = (
        accumulate_gram(one, fit, {}) for one in (of_gpu, of_cpu)
    )
    assert gram.is_cuda  # so that no batch waits for it to be moved
    lam = 0.1 * expected_gram.diagonal().mean().item()
    expected = solve_ridge(expected_gram, expected_cross, lam)
    torch.testing.assert_close(solve_ridge(gram, cross, lam).cpu(), expected, rtol=0, atol=1e-9)


def test_a_gram_matrix_without_room_on_the_gpu_is_kept_by_the_cpu(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 8 * 100**2, 10**9))
    assert (device_with_room(100, gpu), device_with_room(101, gpu), device_with_room(100, cpu)) == (
        gpu,
        cpu,
        cpu,
    )
    with pytest.raises(UserError, match=r"Gram matrices of 1000000 x 1000000 need 32000\.0 GB"):
        device_with_room(10**6, gpu)


def test_no_other_matrix_has_a_lower_objective(pico, input_ids):
    """Eq. 11 and 12 as they are written: W' A against T = X_O - X_F - b, with W' close to I."""
    pruned = prune(pico, input_ids, batch_size=5)
    gram, cross = accumulate_gram(pruned, Fit(ffn(LAYER), ffn(LAYER)), {})
    added, missing = activations(pruned, refit=False)
    lam = 0.01 * gram.diagonal().mean().item()

    def objective(matrix):
        target = added + missing
        return (added @ matrix.mT - target).square().sum() + lam * (
            matrix - torch.eye(len(matrix))
        ).square().sum()

    best = torch.eye(len(gram)) + solve_ridge(gram, cross, lam)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step = 1e-3 * torch.randn(best.shape, generator=generator, dtype=torch.float64)
        assert objective(best) < objective(best + step)
    assert objective(best) < objective(torch.eye(len(best), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_solved_with_in_float64_whatever_the_model_computes_in(dtype):
    features, missing = torch.eye(3, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    gram, cross = ridge_sums(features, missing, None)
    assert torch.equal(gram, torch.eye(3, dtype=torch.float64))
    halves = torch.full((2, 3), 0.5, dtype=torch.float64)
    # the root of two, squared
    torch.testing.assert_close(solve_ridge(gram, cross, 1.0), halves, rtol=1e-15, atol=0)


def test_without_held_out_samples_lambda_is_the_papers_and_the_repair_is_applied(pico, input_ids):
    """Eq. 11 as a mean over tokens and channels, beside 1e-3 of Eq. 12: from all samples."""
    calibration = Calibration("test", 0, input_ids, held_out=0)
    pruned = Pruned(pico.layered(), calibration, REMOVED, Batches(2), accept_all=True)
    compensation = project_most_drifted(pruned)
    (correction,) = compensation.corrections
    assert correction.accepted
    assert (correction.held_out_divergence_before, correction.held_out_divergence_after) == (
        None,
        None,
    )
    added, missing = activations(pruned, refit=False, layer=correction.place.layer)
    identity = torch.eye(added.shape[1], dtype=torch.float64)

    def slope(matrix):
        matrix = matrix.clone().requires_grad_(True)
        objective = (added @ matrix.mT - (added + missing)).square().mean()
        objective = objective + 1e-3 * (matrix - identity).square().sum()
        return torch.autograd.grad(objective, matrix)[0].norm()

    assert slope(inside(correction).matrix) < 1e-9 * slope(identity)


def test_repairs_that_are_always_accepted_are_applied_though_they_do_harm(picos, input_ids):
    class Worse(Pruned):
        def divergence(self, changes):
            return float(len(changes))

    pruned = prune(picos["llama"], input_ids)
    for accept_all in (False, True):
        judged = Worse(*vars(replace(pruned, accept_all=accept_all)).values()).judge(
            [(Place(4, "x"), None)], {}
        )
        assert [one.accepted for one in judged] == [accept_all]
        assert Compensation(judged).held_out_divergence == float(accept_all)


def test_drift_is_the_distance_of_mean_outputs(pico, input_ids):
    pruned = prune(pico, input_ids)
    model, layers = pruned.model, list(pruned.model.layers)
    drift = mean_drift(pruned)
    assert sorted(drift) == [0, 2, 4]
    dense = run_and_capture(model, layers, input_ids)
    with model.without(REMOVED):
        kept = run_and_capture(model, [layers[index] for index in drift], input_ids)
    for (index, value), (_, without) in zip(drift.items(), kept, strict=True):
        expected = (dense[index][1].mean(dim=(0, 1)) - without.mean(dim=(0, 1))).norm().item()
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert drift[0] == 0.0  # nothing was removed before it


def test_identity_changes_nothing_and_the_hook_spares_the_bias(pico, input_ids):
    model = pico.load()
    width = len(model.get_input_embeddings().weight[0])
    matrix = torch.randn(
        width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    place = Place(LAYER, pico.architecture.down_projection)
    projection = pico.architecture.down_projection_of(pico.architecture.layer_list(model)[LAYER])
    bias = getattr(projection, "bias", None)
    bias = 0 if bias is None else bias
    ((_, plain),) = run_and_capture(LayeredModel.of(model), [projection], input_ids)
    identity = {place: [Projection(torch.eye(width, dtype=torch.float64))]}
    with LayeredModel.of(model).changed(identity):
        ((_, same),) = run_and_capture(LayeredModel.of(model), [projection], input_ids)
    with LayeredModel.of(model).changed({place: [Projection(matrix)]}):
        ((_, corrected),) = run_and_capture(LayeredModel.of(model), [projection], input_ids)
    torch.testing.assert_close(same, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(corrected, (plain - bias) @ matrix.mT + bias, rtol=1e-10, atol=1e-10)


def test_the_correction_is_chosen_and_judged_on_held_out_samples(pico, input_ids):
    calibration = Calibration("test", 0, input_ids.repeat(2, 1))
    pruned = Pruned(pico.layered(), calibration, REMOVED, Batches(4))
    compensation = project_most_drifted(pruned)
    (correction,) = compensation.corrections
    assert correction.place.layer == max(compensation.drift, key=compensation.drift.get)
    model, held_out = pruned.model, calibration.held_out_ids
    dense = model.network(input_ids=held_out).logits

    def divergence(changes):
        with model.changed(changes, without=REMOVED):
            logits = model.network(input_ids=held_out).logits
        return sample_divergences_reference(logits, dense).sum().item() / held_out.numel()

    before, after = divergence({}), divergence({correction.place: [correction.change]})
    assert correction.held_out_divergence_before == pytest.approx(before, rel=1e-9)
    assert correction.held_out_divergence_after == pytest.approx(after, rel=1e-9)
    assert correction.accepted == (after < before)


@pytest.mark.parametrize("removed", [(1, 3), (1, 2), (0, 4), (2, 3, 4)])
def test_runs_are_repaired_in_the_layer_before_them(picos, input_ids, removed):
    runs = {(1, 3): [(0, 1), (2, 3)], (1, 2): [(0, 2)], (0, 4): [(3, 4)], (2, 3, 4): [(1, 4)]}
    expected = [(ffn(before), ffn(last)) for before, last in runs[removed]]
    assert prune(picos["llama"], input_ids, removed=pairs(*removed)).runs() == expected


@pytest.mark.parametrize("name", ["sequential", "refit", "distil"])
def test_only_what_brings_the_model_nearer_to_the_dense_one_is_kept(pico, input_ids, name):
    if name == "refit" and pico.architecture.expert_down_projections is not None:
        with pytest.raises(UserError, match="use sequential"):
            repair(name, prune(pico, input_ids))
        return
    pruned = prune(pico, input_ids)
    whole = pruned.model.network(input_ids=input_ids).logits
    compensation = repair(name, pruned)
    divergences = [pruned.divergence({})]
    judged = [
        (one.held_out_divergence_before, one.held_out_divergence_after)
        for one in compensation.corrections
    ]
    for before, after in dict.fromkeys(judged):
        assert before == pytest.approx(divergences[-1], rel=1e-9)
        divergences.append(min(before, after))
    assert pruned.divergence(compensation.changes) == pytest.approx(divergences[-1], rel=1e-9)
    after = pruned.model.network(input_ids=input_ids).logits
    torch.testing.assert_close(after, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sequential", "refit", "distil"])
@pytest.mark.parametrize("enough", [False, True])
def test_too_few_tokens_to_fit_on_are_told(picos, input_ids, capsys, monkeypatch, name, enough):
    pruned = prune(picos["llama"], input_ids)
    config, tokens = pruned.model.config, pruned.calibration.fit_ids.numel()
    inputs = config.hidden_size if name == "sequential" else config.intermediate_size
    monkeypatch.setattr(
        "gradmap.methods.ridge.TOKENS_PER_INPUT", tokens / inputs + (0 if enough else 0.01)
    )
    repair(name, pruned)
    told = "tokens are few to fit so wide a map on" in capsys.readouterr().err
    assert told == (not enough and name != "distil")  # which writes what is missing


@pytest.mark.parametrize("name", ["sequential", "refit"])
def test_repairs_around_runs_by_hand(picos, input_ids, name):
    """Before each run towards what its last layer gave in the dense model, and behind the last one
    towards what that layer gave itself; each behind the repairs before it."""
    pruned = replace(prune(picos["llama"], input_ids), accept_all=True)
    model, ids = pruned.model, pruned.calibration.fit_ids
    layers = list(model.layers)
    wanted = [output for _, output in run_and_capture(model, layers, ids)]
    repairs = repair(name, pruned).corrections
    changes: dict = {}
    for (layer, last), correction in zip([(0, 1), (2, 3), (4, 4)], repairs, strict=True):
        assert correction.place == Place(layer, model.architecture.down_projection)
        projection = model.down_projection(layer)
        with model.changed(changes, without=REMOVED):
            (_, given), (inputs, added) = run_and_capture(model, [layers[layer], projection], ids)
        features = inputs if name == "refit" else linear_output(projection, added)
        scale = 1 / wanted[last].norm(dim=-1, keepdim=True)
        inputs, targets = (
            (tensor * scale).flatten(end_dim=-2) for tensor in (features, wanted[last] - given)
        )
        solution = solve_ridge_reference(inputs, targets, correction.lam)
        if name == "sequential":
            solution = solution + torch.eye(len(solution))
        torch.testing.assert_close(inside(correction).matrix, solution, rtol=0, atol=1e-9)
        changes[correction.place] = (correction.change,)


def test_a_real_model_is_repaired(smollm2):
    """Each repair that may change more does better: of nothing, of the layer before each cut, of
    all that is left."""
    calibration = build_calibration(
        load_tokenizer(smollm2.directory), BOOLQ, samples=16, tokens=64, seed=42
    )
    model = LayeredModel.of(load_model(smollm2, "float32"))
    pruned = Pruned(model, calibration, pairs(13, 14, 16), Batches(4))
    names = ("none", "sequential", "refit", "distil")
    divergences = {name: pruned.divergence(repair(name, pruned).changes) for name in names}
    assert sorted(divergences, key=divergences.__getitem__, reverse=True) == list(names)
