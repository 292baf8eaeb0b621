"""Repairs of models without pairs of sublayers: where the cut follows an attention, in its output
projection."""

from dataclasses import replace

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.methods.compensation import run_and_capture
from gradmap.methods.features import Fit, accumulate_gram, output_weight
from gradmap.methods.gradmap.projection import mean_drift
from gradmap.methods.least_squares import solve_ridge_reference
from gradmap.model.corrections import linear_output
from gradmap.model.layerwise import sample_divergences_reference
from gradmap.model.sublayers import joined_layers
from tests.conftest import CORRECTABLE, inside
from tests.families import LAYERS
from tests.gradmap.named_methods import repair
from tests.gradmap.removals import attention, ffn, pairs
from tests.gradmap.repairs import prune, states_behind

SHIFTED = pairs("M0+A1", 3)
NAMES = ("projection", "projection-adam", "sequential", "refit", "magnitude", "distil")


def can_repair(pico, name):
    if pico.architecture.uncorrectable is not None:
        return name in ("distil", "refit", "sequential")
    return name != "refit" or pico.architecture.expert_down_projections is None


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        (("M0+A1",), [(attention(0), attention(1))]),
        (("M3+A4",), [(attention(3), attention(4))]),
        (("M0+A1", "M1+A2"), [(attention(0), attention(2))]),
        (("M1+A2", "M0+A1"), [(attention(0), attention(2))]),
        ((1, "M0+A2"), [(attention(0), attention(2))]),
        (("M1+A2", "A1+M2"), [(ffn(0), ffn(2))]),
        (("M1+A2", "A1+M2", "M3+A4"), [(ffn(0), ffn(2)), (attention(3), attention(4))]),
        ((0, "M1+A2"), [(attention(1), attention(2))]),
        (("M0+A1", "A0+M1", 3), [(ffn(2), ffn(3))]),
    ],
)
def test_runs_of_pairs_are_repaired_in_the_sublayer_before_them(
    picos, input_ids, removed, expected
):
    assert prune(picos["llama"], input_ids, removed=pairs(*removed)).runs() == expected


A_FFN_BEHIND_EACH = (
    ("M0+A1", 3),
    [
        (attention(0), attention(1)),
        (ffn(1), ffn(1)),
        (ffn(2), ffn(3)),
        (ffn(4), ffn(4)),
    ],
)
ONE_FFN_BEHIND_TWO = (
    ("M1+A2", "A1+M2", "M3+A4"),
    [(ffn(0), ffn(2)), (attention(3), attention(4)), (ffn(4), ffn(4))],
)


@pytest.mark.parametrize(("removed", "goals"), [A_FFN_BEHIND_EACH, ONE_FFN_BEHIND_TWO], ids=str)
@pytest.mark.parametrize("name", ["sequential", "refit"])
@pytest.mark.parametrize("family", CORRECTABLE)
def test_repairs_around_cuts_behind_attentions_by_hand(
    picos, input_ids, family, name, removed, goals
):
    """The sublayer before each run towards what followed its last one in the dense model, and the
    FFN behind it towards what that gave; each behind the repairs before it."""
    pruned = replace(prune(picos[family], input_ids, removed=pairs(*removed)), accept_all=True)
    model, ids = pruned.model, pruned.calibration.fit_ids
    if not can_repair(picos[family], name):
        with pytest.raises(UserError, match="cannot be refitted; use sequential"):
            repair(name, pruned)
        return
    wanted = states_behind(model, ids)
    repairs = repair(name, pruned).corrections
    changes: dict = {}
    for (before, last), correction in zip(goals, repairs, strict=True):
        assert correction.place == model.output_of(before)
        output_map = model.map_at(correction.place)
        with model.changed(changes, without=pruned.removed):
            ((inputs, added),) = run_and_capture(model, [output_map], ids)
        given = states_behind(model, ids, pruned.removed, changes)[before]
        features = inputs if name == "refit" else linear_output(output_map, added)
        scale = 1 / wanted[last].norm(dim=-1, keepdim=True).flatten(end_dim=1)
        inputs, targets = (
            tensor.flatten(end_dim=-2) * scale for tensor in (features, wanted[last] - given)
        )
        solution = solve_ridge_reference(inputs, targets, correction.lam)
        if name == "sequential":
            solution = solution + torch.eye(len(solution))
        torch.testing.assert_close(inside(correction).matrix, solution, rtol=0, atol=1e-9)
        changes[correction.place] = (correction.change,)


def test_the_right_side_of_an_attention_output_is_least_squares_too(picos, input_ids):
    pruned = prune(picos["llama"], input_ids, removed=SHIFTED)
    model, ids = pruned.model, pruned.calibration.fit_ids
    gram, cross = accumulate_gram(pruned, Fit(attention(0), attention(1), "right"), {})
    output_map = model.map_at(model.output_of(attention(0)))
    with model.without(SHIFTED):
        ((inputs, _),) = run_and_capture(model, [output_map], ids)
    inputs = inputs.flatten(end_dim=-2)
    missing = states_behind(model, ids)[attention(1)]
    missing = missing - states_behind(model, ids, SHIFTED)[attention(0)]
    torch.testing.assert_close(gram, inputs.mT @ inputs)
    torch.testing.assert_close(cross, missing.flatten(end_dim=-2).mT @ inputs)
    assert torch.equal(output_weight(pruned, attention(0)), output_map.weight)


@pytest.mark.parametrize("name", NAMES)
def test_repairs_of_pairs_bring_the_model_nearer_or_are_left_out(pico, input_ids, name):
    pruned = prune(pico, input_ids, removed=SHIFTED)
    if not can_repair(pico, name):
        with pytest.raises(UserError, match=r"cannot be (refitted|corrected by)"):
            repair(name, pruned)
        return
    model, held_out = pruned.model, pruned.calibration.held_out_ids
    dense = model.network(input_ids=held_out).logits
    compensation = repair(name, pruned)

    def divergence(changes):
        with model.changed(changes, without=SHIFTED):
            logits = model.network(input_ids=held_out).logits
        return sample_divergences_reference(logits, dense).sum().item() / held_out.numel()

    first, before, after = (
        compensation.corrections[0].held_out_divergence_before,
        divergence({}),
        divergence(compensation.changes),
    )
    assert first == pytest.approx(before, rel=1e-9)
    assert compensation.held_out_divergence == pytest.approx(after, rel=1e-9)
    assert (after < before) if compensation.changes else after == before
    kept = {model.output_of(sublayer) for sublayer in pruned.kept}
    kept |= {
        norm.place for sublayer in pruned.kept if (norm := model.norm_behind(sublayer)) is not None
    }
    trained = {place for place, _ in model.linear_maps(pruned.kept)}
    assert {one.place for one in compensation.corrections} <= kept | trained
    torch.testing.assert_close(model.network(input_ids=held_out).logits, dense, rtol=0, atol=0)


def test_drift_is_behind_the_ffn_of_a_joined_layer(pico, input_ids):
    pruned = prune(pico, input_ids, removed=SHIFTED)
    dense, given = (states_behind(pruned.model, input_ids, gone) for gone in ((), SHIFTED))
    drift = mean_drift(pruned)
    assert list(drift) == [1, 2, 4]
    for layer, value in drift.items():
        difference = dense[ffn(layer)].mean(dim=(0, 1)) - given[ffn(layer)].mean(dim=(0, 1))
        assert value == pytest.approx(difference.norm().item(), rel=1e-9)


@pytest.mark.parametrize(("target", "trained"), [("q", 0), ("gate", 1)])
def test_a_map_of_a_joined_layer_is_trained_through_it(picos, input_ids, target, trained):
    """Where the attention is that of layer 0, and the FFN that of layer 1."""
    removed = pairs("M0+A1")
    pruned = prune(picos["llama"], input_ids, removed=removed)
    count = len(joined_layers(LAYERS, removed))
    corrections = repair("projection-adam", pruned, target=target, top_z=count).corrections
    assert [one.place.layer for one in corrections] == [trained, 2, 3, 4]
    first = {corrections[0].place: (corrections[0].change,)}
    ids = pruned.calibration.fit_ids
    wanted = states_behind(pruned.model, ids)[ffn(1)]
    without, with_it = (
        (wanted - states_behind(pruned.model, ids, removed, changes)[ffn(1)]).square().sum()
        for changes in ({}, first)
    )
    assert with_it < without
