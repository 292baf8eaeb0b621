"""NaN and infinity are refused in one sentence wherever they appear, and never written; each method
is asked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradmap.common.errors import UserError
from gradmap.data.calibration import Calibration
from gradmap.methods.compensation import Compensation, Correction, Pruned
from gradmap.methods.least_squares import solve_ridge
from gradmap.methods.registry import compensator, compensator_names, selector_names
from gradmap.methods.selection import Subject, select
from gradmap.model.batching import Batches
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.corrections import Place, Scale
from gradmap.model.layered import LayeredModel
from gradmap.pruning.prune import prune
from gradmap.pruning.settings import PruneSettings
from tests.conftest import Pico
from tests.families import LAYERS
from tests.gradmap.named_methods import NOT_NESTED, make_scorer, repair
from tests.gradmap.removals import pairs

MEASURING = sorted(set(selector_names()) - {"last", "manual", "random", "mka-as-released"})
REPAIRING = sorted(set(compensator_names()) - {"none"})
DAMAGED = "model.layers.2.mlp.down_proj.weight"
# A weight that is no number, and finite ones whose products are none.
WEIGHTS = {"nan": float("nan"), "infinity": float("inf"), "overflow": 3e38}


def damaged(pico: Pico, kind: str):
    """The model in float32, with one weight of layer 2 changed, or for an overflow all of one."""
    model = pico.load(torch.float32)
    weight = model.get_parameter(DAMAGED)
    place = ... if kind == "overflow" else (0, 0)
    weight[place] = WEIGHTS[kind]
    return model


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", MEASURING)
def test_no_selector_chooses_by_what_is_no_number(picos, input_ids, name, kind):
    pico = picos["llama"]
    subject = Subject(
        LayeredModel.of(damaged(pico, kind)), Calibration("test", 3, input_ids), count=2
    )
    one_shot = name in NOT_NESTED
    steps: list = []
    try:
        select(
            lambda: make_scorer(name, subject),
            subject,
            2,
            one_shot=one_shot,
            done=[],
            record=steps.append,
        )
    except UserError as error:
        assert "is not finite; the checkpoint is damaged, or its dtype overflows" in str(error)
        assert not steps
    else:
        assert (name, kind) == ("magnitude", "overflow")  # whose sum is a number


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", REPAIRING)
def test_no_compensator_repairs_by_what_is_no_number(picos, input_ids, name, kind):
    pico = picos["llama"]
    calibration = Calibration("test", 3, input_ids)
    pruned = Pruned(LayeredModel.of(damaged(pico, kind)), calibration, pairs(3), Batches(2))
    for accept_all in (False, True):
        with pytest.raises(
            UserError, match="is not finite; the checkpoint is damaged, or its dtype overflows"
        ):
            repair(name, replace(pruned, accept_all=accept_all))


@pytest.fixture
def copied(picos: dict[str, Pico], tmp_path: Path) -> Path:
    return Path(shutil.copytree(picos["llama"].directory, tmp_path / "model"))


@pytest.mark.parametrize("kind", ["nan", "infinity"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_weight_is_named_before_anything_is_chosen(
    copied, word_file, tmp_path, stream, kind
):
    tensors = load_file(copied / "model.safetensors")
    tensors[DAMAGED][1, 2] = WEIGHTS[kind]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    selector = "gradient" if stream else "random"  # which reads no weight
    settings = PruneSettings(
        remove=2,
        calibration=f"file:{word_file}",
        selector=selector,
        compensator="none",
        samples=4,
        tokens=8,
        device="cpu",
        stream=stream,
    )
    with pytest.raises(UserError, match=f"The weight {DAMAGED} is not finite"):
        prune(open_checkpoint(str(copied)), settings, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nothing_of_a_compensation_may_be_no_number(number):
    good = Correction(Place(3, "mlp.down_proj"), Scale(torch.tensor(2.0)), 0.2, 0.1, True)
    assert Compensation((good,), {3: 0.5}).corrections == (good,)
    with pytest.raises(UserError, match="drift of layer 3 is not finite"):
        Compensation((), {3: number})
    for broken in (
        replace(good, held_out_divergence_before=number),
        replace(good, held_out_divergence_after=number, accepted=False),
        replace(good, lam=number),
    ):
        with pytest.raises(UserError, match=r"layer 3 \(mlp\.down_proj\).*is not finite"):
            Compensation((good, broken))


def with_idle_ffns(pico: Pico):
    """As of layers with which a model was made deeper: their down projections are zero."""
    model = pico.load()
    for layer in range(LAYERS):
        model.get_parameter(DAMAGED.replace("2", str(layer)))[:] = 0
    return model


@pytest.mark.parametrize("held_out", [None, 0])
@pytest.mark.parametrize("name", ["projection", "sequential"])
def test_what_an_idle_ffn_adds_cannot_be_repaired_and_stays(picos, input_ids, name, held_out):
    pico, calibration = picos["llama"], Calibration("test", 3, input_ids, held_out=held_out)
    pruned = Pruned(
        LayeredModel.of(with_idle_ffns(pico)),
        calibration,
        pairs(2, 3),
        Batches(2),
        accept_all=True,
    )
    corrections = repair(name, pruned).corrections
    assert corrections
    for correction in corrections:
        assert torch.equal(correction.change.tensors["matrix"], torch.eye(32, dtype=torch.float64))


def test_layers_with_idle_ffns_are_chosen(picos, input_ids):
    pico = picos["llama"]
    steps: list = []
    subject = Subject(LayeredModel.of(with_idle_ffns(pico)), Calibration("test", 3, input_ids))
    selection = select(
        lambda: make_scorer("repair", subject),
        subject,
        2,
        one_shot=False,
        done=[],
        record=steps.append,
    )
    assert len(set(selection.removal_order)) == 2


def test_too_few_tokens_without_regularisation_are_told():
    with pytest.raises(UserError, match="too few calibration tokens"):
        solve_ridge(torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double(), torch.ones(2, 2).double(), 0.0)


def test_what_cannot_be_fitted_on_is_told():
    gram = torch.eye(3).double()
    gram[1, 1] = float("nan")
    with pytest.raises(UserError, match="What is fitted on is not finite"):
        solve_ridge(gram, torch.ones(2, 3).double(), 0.1)


def test_a_correction_that_is_no_number_is_not_written(copied, word_file, tmp_path, monkeypatch):
    """Nor where nothing is held out, so that no divergence tells."""
    place, scale = Place(1, "mlp.down_proj"), Scale(torch.tensor(float("nan")))
    broken = Compensation((Correction(place, scale, None, None, True),))
    breaking = replace(compensator("magnitude"), run=lambda pruned: broken)
    monkeypatch.setattr("gradmap.pruning.prune.compensator", lambda name: breaking)
    settings = PruneSettings(
        remove=2,
        calibration=f"file:{word_file}",
        selector="manual",
        layers=list(pairs(2, 3)),
        compensator="magnitude",
        accept="always",
        held_out=0,
        samples=4,
        tokens=8,
        device="cpu",
    )
    with pytest.raises(
        UserError, match=r"The correction layers.1.mlp.down_proj.scale\.factor is not finite"
    ):
        prune(open_checkpoint(str(copied)), settings, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()
