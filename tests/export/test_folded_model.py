"""Nothing but float32 arithmetic separates an artifact from its reference, whatever it is rounded
to."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from export import fold, reference
from export.reference import compute_references
from export.tolerance import logit_tolerance
from gradmap.common.errors import UserError
from gradmap.model.corrections import ALL, Place, Projection, Scale, fold_changes
from tests.conftest import Pico
from tests.export.sources import CORRECTED, REMOVED, export, make_source
from tests.families import LAYERS

KEPT = LAYERS - len(REMOVED)
# Of the picos in float32
EXACT = logit_tolerance(KEPT, 32, torch.float32)


def require_exact(check):
    assert check.relative_difference == check.typical_difference <= check.tolerance == EXACT < 1e-5
    assert check.stray_share == 0


def test_a_bfloat16_artifact_of_every_family_has_the_weights_of_its_reference(pico, tmp_path):
    """Scales of maps with a bias (OPT, GPT-2), transposed weights (GPT-2), stacked experts
    (Mixtral, Qwen)."""
    record = export(make_source(pico), tmp_path, "hf", dtype="bfloat16")["hf"]
    require_exact(record.verification["transformers"])


@pytest.fixture(params=["bfloat16", "mixed"])
def bfloat16_pico(request, picos, tmp_path):
    """Every tensor in bfloat16; or all but those of norms, which stay in float32, and corrected
    weights in float16."""
    directory = shutil.copytree(picos["opt"].directory, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if request.param == "bfloat16":
            weights[name] = weight.bfloat16()
        elif "norm" not in name:
            weights[name] = weight.half() if name.endswith("out_proj.weight") else weight.bfloat16()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return Pico("opt", directory)


@pytest.mark.parametrize("dtype", ["keep", "float32", "float64"])
def test_corrected_weights_are_rounded_to_what_they_are_stored_in(bfloat16_pico, tmp_path, dtype):
    record = export(make_source(bfloat16_pico), tmp_path / "out", "hf", dtype=dtype)["hf"]
    require_exact(record.verification["transformers"])


def test_one_weight_that_is_off_by_a_thousandth_is_refused(picos, tmp_path, monkeypatch):
    def fold_wrongly(tensor, changes, transposed, dtype):
        folded = fold_changes(tensor, changes, transposed)
        wrong = isinstance(changes[0], Projection) and tensor.dim() == 2
        return (1.001 * folded if wrong else folded).to(dtype)

    monkeypatch.setattr(fold, "fold_changes", fold_wrongly)
    with pytest.raises(UserError, match="differ from the reference") as refused:
        export(make_source(picos["llama"]), tmp_path, "hf", dtype="bfloat16")
    difference = float(re.search(r"by (\S+) \(relative\)", str(refused.value))[1])
    # a reference whose corrected weights were not rounded would have to allow for as much as this
    assert EXACT < difference < logit_tolerance(KEPT, 32, torch.float32, torch.bfloat16)
    assert list(tmp_path.iterdir()) == []


class MisfoldedScale(Scale):
    def fold(self, weight, rows=ALL):
        return 1.001 * super().fold(weight, rows)


def test_a_change_that_folds_into_something_else_is_refused_before_anything_is_written(
    picos, tmp_path
):
    """What is written and its reference would agree."""
    place, factor = Place(CORRECTED, "self_attn.o_proj"), torch.tensor(1.5)
    source = make_source(picos["llama"])
    right, wrong = (
        replace(source, changes={place: (kind(factor),)}) for kind in (Scale, MisfoldedScale)
    )
    export(right, tmp_path / "right", "hf")
    with pytest.raises(UserError, match="Folded into the weights"):
        export(wrong, tmp_path / "wrong", "hf")
    assert not list((tmp_path / "wrong").glob("*"))


def test_a_model_larger_than_memory_is_compared_unfolded_and_as_it_is_stored(picos, monkeypatch):
    monkeypatch.setattr(reference, "placement_for", lambda directory: {"device_map": "cpu"})
    source = make_source(picos["llama"])
    dtypes = (torch.float32, torch.bfloat16)

    def exactness(changes):
        found = compute_references(
            source.checkpoint, source.removed, changes, source.probe_ids, dtypes
        )
        return [found[dtype].exact for dtype in dtypes]

    assert exactness(source.changes) == [False, False]
    assert exactness({}) == [True, False]
