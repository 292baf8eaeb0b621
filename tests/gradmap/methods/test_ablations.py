"""The ablations of GradMAP's stage 2: other sides, other maps, more layers, no regularisation."""

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.methods.compensation import run_and_capture
from gradmap.methods.features import Fit, accumulate_gram, output_weight
from gradmap.methods.gradmap.projection import most_drifted
from gradmap.methods.least_squares import RightSolver
from gradmap.model.corrections import Projection, Update
from gradmap.pruning.plan import load_plan
from tests.command_line import gradmap
from tests.gradmap.methods.test_baselines import prune
from tests.gradmap.named_methods import repair
from tests.gradmap.pruning.test_prune import prune_arguments
from tests.gradmap.removals import ffn, pairs


def lacking(pruned, correction):
    """Squared distance of the corrected layer's output from the dense model's, without and with the
    correction."""
    ids = pruned.calibration.fit_ids
    layer = pruned.model.layers[correction.place.layer]
    ((_, wanted),) = run_and_capture(pruned.model, [layer], ids)
    for changes in ({}, {correction.place: (correction.change,)}):
        with pruned.model.changed(changes, without=pruned.removed):
            ((_, given),) = run_and_capture(pruned.model, [layer], ids)
        yield (wanted - given).square().sum().item()


def test_the_right_side_in_closed_form_is_least_squares(picos, input_ids):
    pico = picos["llama"]
    pruned = prune(pico, input_ids, pairs(1, 3))
    gram, cross = accumulate_gram(pruned, Fit(ffn(4), ffn(4), "right"), {})
    weight = output_weight(pruned, ffn(4))
    solver = RightSolver(gram, cross, weight)
    for relative in (0.1, 1.0):
        lam = relative * gram.diagonal().mean().item() * weight.square().sum(dim=0).mean().item()
        # minimise |D - W S X|^2 + lam |S|^2 over vec(S): (X X^T kron W^T W + lam I) vec(S) =
        # vec(W^T D X^T)
        system = torch.kron(gram, weight.mT @ weight) + lam * torch.eye(
            len(gram) ** 2, dtype=torch.float64
        )
        expected = (
            torch.linalg.solve(system, (weight.mT @ cross).mT.flatten())
            .reshape(len(gram), len(gram))
            .mT
        )
        torch.testing.assert_close(solver.solve(lam), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["projection", "projection-adam"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_either_side_of_the_down_projection_lowers_what_the_layer_lacks(
    picos, input_ids, name, side
):
    pico = picos["llama"]
    pruned = prune(pico, input_ids, pairs(1, 3))
    (correction,) = repair(name, pruned, side=side).corrections
    assert isinstance(correction.change, Projection if side == "left" else Update)
    before, after = lacking(pruned, correction)
    assert after < before


def test_the_layers_that_drifted_most_are_repaired_front_to_back(picos, input_ids):
    pruned = prune(picos["llama"], input_ids, pairs(1, 3))
    compensation = repair("projection", pruned, top_z=2)
    drift = compensation.drift
    assert [one.place.layer for one in compensation.corrections] == sorted(
        sorted(drift, key=drift.get)[-2:]
    )
    with pytest.raises(UserError, match="only 3 layers are left"):
        repair("projection", pruned, top_z=4)


def test_of_layers_that_drifted_most_the_front_one_is_repaired_first_though_it_drifted_most():
    assert most_drifted({0: 3.0, 2: 1.0, 4: 2.0}, 2) == [0, 4]


def test_other_maps_are_trained_through_the_layer(picos, input_ids):
    pico = picos["llama"]
    pruned = prune(pico, input_ids, pairs(1, 3))
    with pytest.raises(UserError, match="use --compensator projection-adam"):
        repair("projection", pruned, target="gate")
    (correction,) = repair("projection-adam", pruned, target="gate").corrections
    assert correction.place.target == "mlp.gate_proj"
    before, after = lacking(pruned, correction)
    assert after < before
    with pytest.raises(UserError, match=r"no q_proj; the linear maps of a layer are attn\.c_attn"):
        repair("projection-adam", prune(picos["gpt2"], input_ids, pairs(1, 3)), target="q")


def test_without_eq_12_nothing_is_regularised(picos, input_ids):
    pruned = prune(picos["llama"], input_ids, pairs(1, 3))
    (correction,) = repair("projection", pruned, unregularised=True).corrections
    assert correction.lam == 0.0
    (trained,) = repair("projection-adam", pruned, unregularised=True).corrections
    assert trained.place == correction.place


def test_ablations_on_the_command_line(picos, word_file, tmp_path):
    arguments = prune_arguments(picos["llama"], word_file, tmp_path / "plan")
    finished = gradmap(*arguments, "--top-z", 2, "--side", "right")
    assert finished.returncode == 0, finished.stderr
    plan = load_plan(tmp_path / "plan")
    assert [one.kind for one in plan.corrections] == ["update", "update"]
    for changes, message in (
        (("--side", "top"), "is not one of 'left', 'right'"),
        (("--compensator", "refit", "--top-z", 2), "are for --compensator projection"),
    ):
        finished = gradmap(*arguments, *changes)
        assert finished.returncode == 2
        assert message in finished.stderr
