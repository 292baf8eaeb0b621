"""The methods whose costs are compared, on a pico model."""

from functools import partial

import pytest
import torch

from benchmarks.flops import counted
from benchmarks.importance import METHODS
from gradmap.data.calibration import Calibration
from gradmap.methods.selection import Subject, select
from tests.families import LAYERS, VOCABULARY

REMOVE = 2


@pytest.fixture(scope="module")
def subject(picos):
    ids = torch.randint(3, VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(1))
    return Subject(picos["llama"].layered(), Calibration("random", 0, ids))


def choose(method, subject):
    scorer = partial(METHODS[method], subject)
    return select(scorer, subject, REMOVE, one_shot=False, done=(), record=lambda step: None)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_chooses_multiplies_and_leaves_the_model_whole(method, subject):
    chosen = []
    assert counted(lambda: chosen.append(choose(method, subject))) > 0
    assert len(set(chosen[0].removal_order)) == REMOVE
    assert list(subject.layers) == list(range(LAYERS))


@pytest.mark.parametrize(
    ("faster", "slower"), [("ours", "naive"), ("SLEB, prefix caching", "SLEB as released")]
)
def test_what_is_computed_otherwise_scores_the_same(faster, slower, subject):
    """In float64, of which 1e-9 is far above the rounding of sums of this length."""
    steps = choose(faster, subject).steps, choose(slower, subject).steps
    for one, other in zip(*steps, strict=True):
        assert one.removed == other.removed
        assert one.scores == pytest.approx(other.scores, rel=1e-9)
