"""What plan.json says of pairs of sublayers must be possible."""

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.common.files import write_json
from gradmap.common.reading import read_json_object
from gradmap.model.corrections import Place, Scale
from gradmap.pruning.plan import PLAN_FILE, load_plan, require_same_model, save_plan
from tests.command_line import gradmap
from tests.export.sources import make_source
from tests.gradmap.pruning.test_plan import record_of
from tests.gradmap.pruning.test_prune import prune_arguments
from tests.gradmap.removals import pairs

CORRECTED = Place(1, "self_attn.o_proj")


@pytest.fixture
def saved(picos, tmp_path):
    """Of M1+A2 and then the layer behind; the attention before it is corrected."""
    change = Scale(torch.tensor(0.5))
    record = record_of(CORRECTED, change)
    plan = make_source(picos["llama"], removed=pairs("M1+A2", 3)).plan
    save_plan(
        tmp_path / "plan",
        plan.model_copy(update={"corrections": [record]}),
        {CORRECTED: (change,)},
        torch.zeros(1, 1, dtype=torch.int64),
    )
    return tmp_path / "plan"


def rewrite(saved, **changes):
    write_json(saved / PLAN_FILE, read_json_object(saved / PLAN_FILE) | changes)


def removing(*order):
    return {"removal_order": list(order), "steps": [{"scores": {}, "removed": list(order)}]}


def correcting(saved, layer, target):
    (record,) = read_json_object(saved / PLAN_FILE)["corrections"]
    return {"corrections": [record | {"layer": layer, "target": target}]}


def test_pairs_are_written_by_name_and_layers_by_number(saved):
    assert read_json_object(saved / PLAN_FILE)["removal_order"] == ["M1+A2", 3]
    assert load_plan(saved).removal_order == list(pairs("M1+A2", 3))
    assert list(map(str, load_plan(saved).kept_layers)) == ["0", "A1+M2", "4"]


@pytest.mark.parametrize("flags", [("--layers", "M1+A2, 3"), ("--layers", "M1+A2", "--layers", 3)])
def test_an_order_of_pairs_is_written_with_commas_or_without(picos, word_file, tmp_path, flags):
    methods = ("--selector", "manual", "--unit", "pair", "--compensator", "none")
    arguments = prune_arguments(picos["llama"], word_file, tmp_path / "plan")
    finished = gradmap(*arguments, *methods, *flags)
    assert finished.returncode == 0, finished.stderr
    assert load_plan(tmp_path / "plan").removal_order == list(pairs("M1+A2", 3))


@pytest.mark.parametrize(
    "order",
    [
        ["M1+A3"],  # layer 2 is between
        ["M1+A3", 2],  # and goes too late
        ["M1+A2", 2],  # whose attention is gone
        ["M1+A2", "M1+A2"],
        ["M1+A2", "M2+A3", "A1+M3", "M0+A4", "A0+M4"],  # and nothing is left
        ["M4+A5"],  # there is no layer 5
    ],
)
def test_what_is_not_there_side_by_side_cannot_go(saved, order):
    rewrite(saved, **removing(*order), corrections=[])
    with pytest.raises(UserError, match=r"plan.json contradicts itself: removal_order does not"):
        load_plan(saved)


@pytest.mark.parametrize("order", [[2, "M1+A3"], ["M1+A2", "A1+M2"], ["M1+A2", "M2+A3", "A1+M3"]])
def test_what_has_become_neighbours_can_go(saved, order):
    rewrite(saved, **removing(*order), corrections=[])
    assert load_plan(saved).removal_order == list(pairs(*order))


@pytest.mark.parametrize("written", ["M1", "M1+M2", "A2+M1", "M1-A2", "M1+A2+M3", 1.5, None])
def test_what_is_no_pair_is_refused(saved, written):
    rewrite(saved, **removing(written))
    with pytest.raises(UserError, match=r"plan\.json: removal_order\.0: .* is n(o|either) "):
        load_plan(saved)


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        (1, "mlp.down_proj"),
        (1, "mlp.gate_proj"),
        (1, ""),  # the hidden state behind its FFN
        (2, "self_attn.o_proj"),
        (2, "self_attn.q_proj"),
    ],
)
def test_a_sublayer_that_is_gone_is_not_corrected(picos, saved, layer, target):
    """Which one a name is of, the model tells."""
    rewrite(saved, **correcting(saved, layer, target))
    plan = load_plan(saved)
    with pytest.raises(UserError, match=rf"corrects the \w+ of layer {layer}, which it removes"):
        require_same_model(plan, picos["llama"].checkpoint)


def test_a_layer_that_is_gone_is_not_corrected(saved):
    rewrite(saved, **correcting(saved, 3, "mlp.down_proj"))
    with pytest.raises(UserError, match="contradicts itself: a layer is corrected that is not"):
        load_plan(saved)


@pytest.mark.parametrize(
    ("layer", "target"), [CORRECTED, (2, "mlp.down_proj"), (2, ""), (0, "mlp.up_proj")]
)
def test_the_sublayer_that_stayed_of_a_layer_is_corrected(saved, layer, target):
    rewrite(saved, **correcting(saved, layer, target))
    (correction,) = load_plan(saved).corrections
    assert (correction.layer, correction.target) == (layer, target)


def test_a_plan_from_before_pairs_is_refused_by_its_number(saved):
    rewrite(saved, schema_version=4)
    with pytest.raises(UserError, match="has plan schema 4, this version reads 5 to 8; prune"):
        load_plan(saved)
