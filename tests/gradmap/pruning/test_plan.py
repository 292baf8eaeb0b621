"""What a plan stores of its corrections is what is read of them."""

import pytest
import torch
from safetensors import safe_open

from gradmap.common.errors import UserError
from gradmap.methods.compensation import Correction
from gradmap.model.corrections import LowRank, Place, Projection, Scale, Update
from gradmap.pruning.correction_records import CorrectionRecord
from gradmap.pruning.plan import (
    CORRECTIONS_FILE,
    load_changes,
    load_plan,
    save_plan,
)
from tests.export.sources import make_source

DOWN = "mlp.down_proj"
CHANGES = {
    Place(0, DOWN): (Projection(torch.eye(2)), LowRank(torch.ones(1, 3), torch.ones(2, 1))),
    Place(2, "mlp"): (Update(torch.ones(2, 3)),),
    Place(2, DOWN): (Update(torch.zeros(2, 3)), Scale(torch.tensor(0.5))),
}


def record_of(place, change, accepted=True):
    return CorrectionRecord.of(Correction(place, change, None, None, accepted))


@pytest.fixture
def saved(picos, tmp_path):
    pairs = [(place, change) for place, changes in CHANGES.items() for change in changes]
    records = [record_of(place, change) for place, change in pairs]
    left_out = record_of(Place(4, DOWN), Scale(torch.tensor(1.0)), accepted=False)
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
                assert torch.equal(found.tensors[name], tensor)


def test_tensors_are_named_as_documented(saved):
    with safe_open(saved / CORRECTIONS_FILE, framework="pt") as file:
        names = set(file.keys())
    assert {"layers.0.mlp.down_proj.low-rank.down", "layers.2.mlp.update.matrix"} < names


def test_a_correction_without_its_tensors_is_named(saved):
    plan = load_plan(saved)
    moved = plan.corrections[0].model_copy(update={"layer": 4})
    with pytest.raises(UserError, match=r"lacks layers\.4\.mlp\.down_proj\.projection, .*prune"):
        load_changes(saved, plan.model_copy(update={"corrections": [moved]}))


def test_two_corrections_that_would_share_their_tensors_are_refused(saved):
    plan = load_plan(saved)
    twice = plan.model_copy(update={"corrections": [*plan.corrections, plan.corrections[0]]})
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(UserError, match="would share their tensors"):
        save_plan(saved.with_name("twice"), twice, {}, ids)
    assert not saved.with_name("twice").exists()
    again = plan.corrections[0].model_copy(update={"accepted": False})
    left_out = plan.model_copy(update={"corrections": [*plan.corrections, again]})
    save_plan(saved.with_name("left-out"), left_out, CHANGES, ids)
    assert load_plan(saved.with_name("left-out")) == left_out
