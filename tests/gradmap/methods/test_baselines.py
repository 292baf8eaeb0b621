"""The methods of other papers: each against a case computed by hand, or against a slow way to the
same."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from gradmap.common.errors import UserError
from gradmap.data.calibration import Calibration
from gradmap.methods import gradpruner as initial_gradients
from gradmap.methods.compensation import Pruned, run_and_capture
from gradmap.methods.gradpruner import (
    importances_of_sublayers,
    lora_gradients,
    merge_where_signs_agree,
    weight_importances,
)
from gradmap.methods.linear_patch import hadamard_matrix
from gradmap.methods.mka import (
    diffusion_embedding,
    entropy,
    last_hidden_states,
    layer_similarities,
    merge_by_similarity,
    mutual_information,
)
from gradmap.methods.selection import Selection, Step, Subject
from gradmap.model.batching import Batches
from gradmap.model.corrections import (
    HIDDEN_STATE,
    Place,
    Scale,
    weight_of,
)
from gradmap.model.layered import LayeredModel
from gradmap.model.sublayers import sublayers_of
from tests.conftest import inside
from tests.families import LAYERS
from tests.gradmap.named_methods import make_scorer, repair
from tests.gradmap.removals import attention, ffn, pairs


def prune(pico, input_ids, removed, model=None):
    """Input ids (N, T) to fit on; the first of them are held out too."""
    calibration = Calibration(
        "test", 0, torch.cat([input_ids, input_ids[: max(1, len(input_ids) // 2)]])
    )
    assert torch.equal(calibration.fit_ids, input_ids)
    return Pruned(
        pico.layered() if model is None else LayeredModel.of(model),
        calibration,
        removed,
        Batches(2),
    )


def scores(name, pico, input_ids, steps=()):
    return make_scorer(name, Subject(pico.layered(), Calibration("test", 3, input_ids))).score(
        Selection(tuple(Step({}, pairs(layer)) for layer in steps)), lambda n: None
    )


def without_epsilon(pico):
    model = pico.load()
    for module in model.modules():
        for name in ("variance_epsilon", "eps"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


# --- Prune&Comp ---


def enlarge_as_the_paper_does(pico, model, layer, alpha):
    """Embeddings, and the last maps of attention and FFN of all layers before, times alpha; the
    head untouched."""
    base = model.base_model
    embeddings = [base.embed_tokens] if pico.family == "llama" else [base.wte, base.wpe]
    with torch.no_grad():
        for embedding in embeddings:
            # no longer tied
            embedding.weight = torch.nn.Parameter(alpha * embedding.weight, requires_grad=False)
        for earlier in pico.architecture.layer_list(model)[:layer]:
            for target in (pico.architecture.attention_output, pico.architecture.down_projection):
                for parameter in earlier.get_submodule(target).parameters():
                    parameter.mul_(alpha)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scaling_what_comes_later_is_scaling_what_came_before(picos, input_ids, family):
    pico = picos[family]
    model = without_epsilon(pico)
    compensation = repair("magnitude", prune(pico, input_ids, pairs(2), model))
    entering, leaving = run_and_capture(
        LayeredModel.of(model), [pico.architecture.layer_list(model)[2]], input_ids
    )[0]
    alpha = (leaving.abs().mean(dim=1) / entering.abs().mean(dim=1)).mean().item()
    changes = {one.place: (one.change,) for one in compensation.corrections}
    assert {place.layer for place in changes} == {3, 4}
    with LayeredModel.of(model).changed(changes, without=pairs(2)):
        ours = model(input_ids=input_ids).logits
    paper = without_epsilon(pico)
    enlarge_as_the_paper_does(pico, paper, 2, alpha)
    with LayeredModel.of(paper).without(pairs(2)):
        theirs = paper(input_ids=input_ids).logits
    assert (ours - theirs).norm() / theirs.norm() < LAYERS * 2**-24  # RMSNorm computes in float32


def test_scales_add_up_in_the_order_of_removal(picos, input_ids):
    pico = picos["llama"]
    pruned = prune(pico, input_ids, pairs(3, 1))
    first = repair("magnitude", prune(pico, input_ids, pairs(3)))
    factor = {one.place: inside(one).factor.item() for one in first.corrections}
    with pruned.model.without(pairs(3)):
        # before the scales of the first
        entering, leaving = run_and_capture(pruned.model, [pruned.model.layers[1]], input_ids)[0]
    alpha = (leaving.abs().mean(dim=1) / entering.abs().mean(dim=1)).mean().item()
    for one in repair("magnitude", pruned).corrections:
        assert inside(one).factor.item() == pytest.approx(
            factor.get(one.place, 1.0) / alpha, rel=1e-9
        )
        assert one.place.layer in (2, 4)


def test_prune_and_comp_scores_the_model_that_was_made_up_for(picos, input_ids):
    pico = picos["llama"]
    changes = {}
    for one in repair("magnitude", prune(pico, input_ids[:-1], pairs(1))).corrections:
        changes[one.place] = (one.change,)
    model = pico.load()
    calibration = Calibration("test", 3, input_ids)
    assert torch.equal(calibration.fit_ids, input_ids[:-1])
    with LayeredModel.of(model).changed(changes, without=pairs(1)):
        captured = run_and_capture(
            LayeredModel.of(model), list(pico.architecture.layer_list(model)), input_ids
        )
    expected = [
        1 - cosine_similarity(entering, leaving, dim=-1).mean().item()
        for entering, leaving in captured
    ]
    assert list(scores("prune-comp", pico, input_ids, steps=(1,)).values()) == pytest.approx(
        expected, rel=1e-9
    )
    *_, last = scores("block-influence", pico, input_ids, steps=(1,)).values()
    assert last != pytest.approx(expected[-1], rel=1e-9)


# --- LinearPatch ---


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 32, 36, 576])
def test_hadamard_matrices(size):
    matrix = hadamard_matrix(size)
    assert set(np.unique(matrix)) <= {-1.0, 1.0}
    assert np.array_equal(matrix @ matrix.T, size * np.eye(size))


def test_a_width_without_a_hadamard_matrix_is_refused():
    with pytest.raises(UserError, match="as wide as the hidden state"):
        hadamard_matrix(2 * 4 * 23)


def test_a_patch_restores_magnitudes_in_the_rotated_basis(picos, input_ids):
    """With one sample, exactly: mean |H h| behind the patch is what it was behind the removed
    layers."""
    pico = picos["llama"]
    pruned = prune(pico, input_ids[:1], pairs(1, 2))
    (correction,) = repair("linear-patch", pruned).corrections
    assert correction.place == Place(0, HIDDEN_STATE)
    basis = torch.from_numpy(hadamard_matrix(32)) / 32**0.5
    layers = pruned.model.layers
    ((_, given), (_, wanted)) = run_and_capture(pruned.model, [layers[0], layers[2]], input_ids[:1])
    patched = given @ inside(correction).matrix.mT
    expected = (wanted @ basis).abs().mean(dim=1)
    torch.testing.assert_close((patched @ basis).abs().mean(dim=1), expected, rtol=1e-9, atol=1e-12)
    with pruned.model.changed({correction.place: (correction.change,)}, without=pairs(1, 2)):
        entering, _ = run_and_capture(pruned.model, [layers[3]], input_ids[:1])[0]
    torch.testing.assert_close(entering, patched, rtol=1e-9, atol=1e-12)


# --- MKA ---


def test_entropy_is_that_of_the_distance_to_the_farthest_neighbour():
    points = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # farthest: 4, 5, 5; k = 2 of n = 3
    expected = -np.mean(np.log([2 / (3 * 16), 2 / (3 * 25), 2 / (3 * 25)]))
    assert entropy(points) == pytest.approx(expected)


def test_an_embedding_tells_clusters_apart():
    generator = np.random.default_rng(0)
    clusters = generator.normal(size=(40, 6)) + np.repeat([[0.0], [50.0]], 20, axis=0)
    first = diffusion_embedding(clusters)[:, 0]
    assert min(first[:20].min(), first[20:].min()) < max(first[:20].max(), first[20:].max())
    assert first[:20].max() < first[20:].min() or first[20:].max() < first[:20].min()


def test_information_is_larger_about_what_depends():
    generator = np.random.default_rng(0)
    points = generator.normal(size=(200, 2))
    independent = generator.normal(size=(200, 2))
    assert mutual_information(points, points[:, ::-1], 0) > 5 * mutual_information(
        points, independent, 0
    )


@pytest.mark.parametrize(
    ("decimals", "expected"),
    [
        (16, 0.5170709229625704),
        (1, 0.5212162156940128),  # with ties, which the noise breaks
    ],
)
def test_information_is_what_scikit_learn_makes_of_it(decimals, expected):
    """expected: of mutual_info_regression (scikit-learn 1.9.1), n_neighbors=5, random_state=7."""
    generator = np.random.default_rng(0)
    points = generator.normal(size=(200, 2))
    others = points @ np.array([[1.0, 0.5], [0.0, 1.0]]) + 0.3 * generator.normal(size=(200, 2))
    given = mutual_information(points.round(decimals), others.round(decimals), seed=7)
    assert given == pytest.approx(expected, rel=1e-9)


def test_mka_removes_the_layer_most_like_the_one_before_it(picos, input_ids):
    pico = picos["llama"]
    ids = input_ids.repeat(3, 1)[:, torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    similarities = layer_similarities(pico.layered(), ids, seed=3)
    assert np.array_equal(similarities, similarities.T)
    given = scores("mka", pico, ids, steps=(2,))
    expected = (-similarities[0, 1], -similarities[1, 3], -similarities[3, 4])
    assert given == dict(zip(pairs(1, 3, 4), expected, strict=True))


def test_hidden_states_of_mka_are_what_enters_a_layer_last(pico, input_ids):
    model = pico.load()
    states = last_hidden_states(LayeredModel.of(model), input_ids)
    captured = run_and_capture(
        LayeredModel.of(model), list(pico.architecture.layer_list(model)), input_ids
    )
    for given, (entering, _) in zip(states, captured, strict=True):
        np.testing.assert_allclose(given, entering[:, -1].numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mka_merges_a_run_into_the_layer_before_it(picos, input_ids, family):
    pico = picos[family]
    pruned = prune(pico, input_ids, pairs(2, 1))
    ids = pruned.calibration.input_ids
    means = layer_similarities(pruned.model, ids, pruned.calibration.seed).mean(axis=1)
    layers = pruned.model.layers
    corrections = merge_by_similarity(pruned).corrections
    assert {one.place for one in corrections} == {
        place for place, _ in pruned.model.linear_maps(sublayers_of([0]))
    }
    for one in corrections:
        own, first, second = (
            weight_of(layers[index].get_submodule(one.place.target)) for index in (0, 1, 2)
        )
        ratios = [1 / (1 + math.exp(-means[0] / (means[0] + means[index]))) for index in (1, 2)]
        expected = (
            ratios[1] * (ratios[0] * own + (1 - ratios[0]) * first) + (1 - ratios[1]) * second
        )
        torch.testing.assert_close(own + inside(one).matrix, expected, rtol=1e-9, atol=1e-12)


def test_mka_as_released_drops_the_last_layers(picos, input_ids):
    given = scores("mka-as-released", picos["llama"], input_ids, steps=(4,))
    assert sorted(given, key=given.get) == list(pairs(3, 2, 1, 0))


# --- GradPruner ---


def test_the_gradients_of_the_first_step_are_those_of_the_weights(picos, input_ids):
    """B is zero: grad B = grad W A^T, and grad A = 0."""
    pico = picos["llama"]
    model = pico.load()
    (first, *_) = lora_gradients(LayeredModel.of(model), input_ids, seed=0)
    maps = dict(LayeredModel.of(model).linear_maps(sublayers_of(range(5))))
    generator = torch.Generator().manual_seed(0)
    downs = {
        place: torch.randn(8, weight_of(module).shape[1], generator=generator, dtype=torch.float64)
        / weight_of(module).shape[1] ** 0.5
        for place, module in maps.items()
    }
    model.requires_grad_(True)
    logits = model(input_ids=input_ids).logits[:, :-1]
    (
        cross_entropy(logits.flatten(end_dim=1), input_ids[:, 1:].flatten(), reduction="sum") / 60
    ).backward()
    for place, (up, down) in first.items():
        expected = maps[place].weight.grad @ downs[place].mT
        # the loss is computed in float32
        torch.testing.assert_close(up, expected, rtol=1e-5, atol=1e-9)
        assert not down.any()


def test_importance_of_a_sublayer_is_that_of_its_weights(picos, input_ids):
    pico = picos["llama"]
    model = pico.load()
    per_weight = weight_importances(LayeredModel.of(model), input_ids, 0, range(5))
    expected = dict.fromkeys(sublayers_of(range(5)), 0.0)
    for place, importance in per_weight.items():
        of_ffn = place.target.startswith("mlp.")
        expected[(ffn if of_ffn else attention)(place.layer)] += importance.sum().item()
    given = importances_of_sublayers(LayeredModel.of(model), input_ids, 0)
    assert given == pytest.approx(expected, rel=1e-9)
    assert tuple(scores("gradpruner", pico, input_ids.flip(0), steps=(0,))) == pairs(1, 2, 3, 4)


def test_only_the_most_important_weights_with_the_same_sign_are_merged(picos, input_ids):
    pico = picos["llama"]
    pruned = prune(pico, input_ids, pairs(3))
    importances = weight_importances(pruned.model, input_ids, 0, [3])
    layers = pruned.model.layers
    corrections = merge_where_signs_agree(pruned).corrections
    assert {one.place.layer for one in corrections} == {2}
    for one in corrections:
        kept, removed = (
            weight_of(layers[index].get_submodule(one.place.target)) for index in (2, 3)
        )
        importance = importances[Place(3, one.place.target)]
        order = importance.flatten().argsort(descending=True)
        important = torch.zeros(importance.numel(), dtype=torch.bool)
        important[order[: math.floor(0.2 * importance.numel())]] = True
        expected = torch.where(important.reshape(kept.shape) & (kept * removed > 0), removed, 0)
        assert torch.equal(inside(one).matrix.ne(0), expected.ne(0))
        torch.testing.assert_close(inside(one).matrix, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mka", "gradpruner"])
def test_experts_are_not_merged(picos, input_ids, name, monkeypatch):
    monkeypatch.setattr(initial_gradients, "STEPS", 1)
    with pytest.raises(UserError, match="experts of two layers do not correspond"):
        repair(name, prune(picos["mixtral"], input_ids, pairs(3)))


def test_a_scale_reaches_the_bias(picos, input_ids):
    pico = picos["opt"]
    model = pico.load()
    place = Place(2, pico.architecture.down_projection)
    module = pico.architecture.layer_list(model)[2].get_submodule(place.target)
    ((_, plain),) = run_and_capture(LayeredModel.of(model), [module], input_ids)
    with LayeredModel.of(model).changed({place: (Scale(torch.tensor(3.0)),)}):
        ((_, scaled),) = run_and_capture(LayeredModel.of(model), [module], input_ids)
    torch.testing.assert_close(scaled, 3 * plain, rtol=1e-12, atol=1e-12)
