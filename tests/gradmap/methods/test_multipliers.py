"""Granite multiplies what attention and FFN add. A fit must know: the model that has the factor in
its weights is the same one."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from gradmap.common.files import write_json
from gradmap.common.reading import read_json_object
from gradmap.methods.repair import RepairScorer
from gradmap.methods.selection import Selection, Step
from tests.conftest import Pico, make_pico
from tests.families import MORE_CONFIGS
from tests.gradmap.named_methods import repair
from tests.gradmap.removals import pairs
from tests.gradmap.repairs import prune
from tests.gradmap.subjects import subject_of

FACTOR = MORE_CONFIGS["granite"]["residual_multiplier"]


@pytest.fixture(scope="module")
def granites(tmp_path_factory) -> tuple[Pico, Pico]:
    """With the factor in the config, and in the weights."""
    root = tmp_path_factory.mktemp("granite")
    multiplied = make_pico("granite", root / "config")
    plain = Pico("granite", root / "weights")
    shutil.copytree(multiplied.directory, plain.directory)
    config = read_json_object(plain.directory / "config.json")
    write_json(plain.directory / "config.json", config | {"residual_multiplier": 1.0})
    path = plain.directory / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(FACTOR)
    save_file(tensors, path, metadata={"format": "pt"})
    return multiplied, plain


@pytest.mark.parametrize("unit", ["layer", "pair"])
def test_scores_after_repairs_are_the_same(granites, input_ids, unit):
    """Also once a layer is gone, and the one before it repaired."""
    so_far = Selection((Step({}, pairs(2)),))
    scores, expected = (
        RepairScorer(subject_of(pico, input_ids, unit=unit)).score(so_far, lambda n: None)
        for pico in granites
    )
    # the weights were rounded to float32 once more
    assert scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("removed", [(1, 3), ("M0+A1", 3)])
@pytest.mark.parametrize("name", ["projection", "sequential", "refit"])
def test_repairs_bring_the_model_as_near(granites, input_ids, name, removed):
    repaired, expected = (
        repair(name, prune(pico, input_ids, removed=pairs(*removed))).corrections
        for pico in granites
    )
    assert [found.place for found in repaired] == [found.place for found in expected]
    for found, wanted in zip(repaired, expected, strict=True):
        assert found.relative_lambda == wanted.relative_lambda
        assert found.held_out_divergence_after == pytest.approx(
            wanted.held_out_divergence_after, rel=1e-5
        )
