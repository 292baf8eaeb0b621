"""What a plan stores of its corrections is what is read of them."""

import pytest
import torch
from safetensors import safe_open

from gradmap.common.errors import UserError
from gradmap.common.files import sha256_file
from gradmap.methods.compensation import Correction
from gradmap.model.corrections import LowRank, Place, Projection, Scale, Trained, Update
from gradmap.pruning import plan_tensors
from gradmap.pruning.correction_records import CorrectionRecord
from gradmap.pruning.plan import (
    load_changes,
    load_plan,
    save_plan,
)
from tests.export.sources import make_source

DOWN = "mlp.down_proj"
CHANGES = {
    Place(0, DOWN): (Projection(torch.eye(2)), LowRank(torch.ones(1, 3), torch.ones(2, 1))),
    Place(2, "mlp"): (Update(torch.ones(2, 3)),),
    # two of a kind, as a plan has them that was gone on from
    Place(2, DOWN): (
        Update(torch.zeros(2, 3)),
        Scale(torch.tensor(0.5)),
        Update(torch.full((2, 3), 3.0)),
    ),
    Place(0, "self_attn.o_proj"): (
        Trained(torch.full((2, 3), 0.1, dtype=torch.bfloat16)),
        Projection(torch.eye(2)),
    ),
    Place(4, DOWN): (Trained(torch.full((2, 3), 0.1)),),
}


def record_of(place, change, accepted=True):
    return CorrectionRecord.of(Correction(place, change, None, None, accepted))


@pytest.fixture
def saved(picos, tmp_path):
    pairs = [(place, change) for place, changes in CHANGES.items() for change in changes]
    records = [record_of(place, change) for place, change in pairs]
    left_out = record_of(Place(4, "mlp.up_proj"), Scale(torch.tensor(1.0)), accepted=False)
    plan = make_source(picos["llama"]).plan.model_copy(update={"corrections": [*records, left_out]})
    save_plan(tmp_path / "plan", plan, CHANGES, torch.zeros(1, 1, dtype=torch.int64))
    return tmp_path / "plan"


def test_corrections_are_read_as_they_were_stored(saved):
    loaded = load_changes(saved, load_plan(saved))
    assert loaded.keys() == CHANGES.keys()
    for place, changes in CHANGES.items():
        for change, found in zip(changes, loaded[place], strict=True):
            assert type(found) is type(change)
            assert found.tensors.keys() == change.tensors.keys()
            for name, tensor in change.tensors.items():
                assert found.tensors[name].dtype == tensor.dtype
                assert torch.equal(found.tensors[name], tensor)


def test_weights_that_were_trained_are_in_files_of_their_own_with_their_hashes(saved, monkeypatch):
    plan = load_plan(saved)
    (name,) = plan.trained_files
    assert plan.trained_files[name] == sha256_file(saved / name)
    monkeypatch.setattr(plan_tensors, "LARGEST_FILE_BYTES", 16)
    split = saved.with_name("split")
    written = save_plan(split, plan, CHANGES, torch.zeros(1, 1, dtype=torch.int64))
    assert len(written.trained_files) == 2
    assert load_plan(split) == written
    for place, changes in load_changes(split, written).items():
        assert [type(change) for change in changes] == [type(change) for change in CHANGES[place]]


@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_trained_weights_that_are_not_what_the_plan_names_are_refused(saved, harm):
    plan = load_plan(saved)
    (name,) = plan.trained_files
    contents = (saved / name).read_bytes()
    (saved / name).write_bytes(
        contents[:-1] + b"\1" if harm == "changed" else contents[: len(contents) // 2]
    )
    if harm == "gone":
        (saved / name).unlink()
    with pytest.raises(UserError, match=rf"{name} (is not what|is damaged|does not exist)"):
        load_changes(saved, plan)


def test_trained_weights_behind_other_corrections_are_refused(saved):
    plan = load_plan(saved)
    turned = plan.model_copy(update={"corrections": plan.corrections[::-1]})
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.o_proj\.trained stands behind"):
        save_plan(saved.with_name("turned"), turned, CHANGES, torch.zeros(1, 1, dtype=torch.int64))


def test_tensors_are_named_as_documented(saved):
    with safe_open(saved / "corrections.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {"layers.0.mlp.down_proj.low-rank.down", "layers.2.mlp.update.matrix"} < names


def test_a_correction_without_its_tensors_is_named(saved):
    plan = load_plan(saved)
    moved = plan.corrections[0].model_copy(update={"layer": 4})
    with pytest.raises(UserError, match=r"lacks layers\.4\.mlp\.down_proj\.projection, .*prune"):
        load_changes(saved, plan.model_copy(update={"corrections": [moved]}))


def test_a_correction_that_was_left_out_may_be_of_a_weight_that_has_its_like(saved):
    plan, ids = load_plan(saved), torch.zeros(1, 1, dtype=torch.int64)
    again = plan.corrections[0].model_copy(update={"accepted": False})
    left_out = plan.model_copy(update={"corrections": [*plan.corrections, again]})
    save_plan(saved.with_name("left-out"), left_out, CHANGES, ids)
    assert load_plan(saved.with_name("left-out")) == left_out
