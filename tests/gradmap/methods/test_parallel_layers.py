"""Layers whose attention and FFN read the same input, or return more than a hidden state: whole
layers go, and are repaired."""

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.methods.features import Fit, accumulate_gram
from gradmap.methods.selection import Selection
from tests.conftest import make_pico
from tests.gradmap.named_methods import make_scorer, repair
from tests.gradmap.removals import ffn, pairs
from tests.gradmap.repairs import LAYER, activations, prune
from tests.gradmap.subjects import subject_of

FAMILIES = ("cohere", "falcon", "bloom", "gpt_neox")


@pytest.fixture(scope="module")
def unpaired(tmp_path_factory):
    root = tmp_path_factory.mktemp("unpaired")
    return {family: make_pico(family, root / family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def pico(request, unpaired):
    return unpaired[request.param]


@pytest.mark.parametrize("kind", ["left", "refit"])
def test_what_is_fitted_is_what_whole_passes_give(pico, input_ids, kind):
    pruned = prune(pico, input_ids)
    gram, cross = accumulate_gram(pruned, Fit(ffn(LAYER), ffn(LAYER), kind), {})
    features, missing = activations(pruned, refit=kind == "refit")
    # sums of some hundred products of float64
    torch.testing.assert_close(gram, features.mT @ features, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cross, missing.mT @ features, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["projection", "sequential", "refit", "magnitude", "distil"])
def test_repairs_are_judged_by_what_they_do(pico, input_ids, name):
    pruned = prune(pico, input_ids)
    plain = pruned.divergence({})
    compensation = repair(name, pruned)
    afters = [
        found.held_out_divergence_after for found in compensation.corrections if found.accepted
    ]
    assert pruned.divergence(compensation.changes) == pytest.approx(min([plain, *afters]), rel=1e-9)


@pytest.mark.parametrize("name", ["repair", "gradient", "block-influence", "sleb", "taylor"])
def test_layers_are_scored(pico, input_ids, name):
    scores = make_scorer(name, subject_of(pico, input_ids)).score(Selection(()), lambda n: None)
    assert set(scores) >= set(pairs(1, 2, 3))
    assert all(torch.isfinite(torch.tensor(score)) for score in scores.values())


def test_other_pairs_than_layers_are_refused(pico, input_ids):
    subject = subject_of(pico, input_ids, unit="pair")
    with pytest.raises(UserError, match=r"only whole layers can go: .*; give --unit layer"):
        make_scorer("sleb", subject)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("cohere", "behind the same norm"), ("falcon", "the same norm"), ("gpt_neox", "has biases")],
)
def test_channels_do_not_move_where_their_norm_cannot_follow(unpaired, input_ids, family, reason):
    with pytest.raises(UserError, match=rf"flatten does not work with this .*model: .*{reason}"):
        repair("flatten", prune(unpaired[family], input_ids))


@pytest.mark.parametrize("name", ["streamline", "ghosted", "laco"])
def test_other_repairs_take_layers_as_wholes(pico, input_ids, name):
    pruned = prune(pico, input_ids)
    compensation = repair(name, pruned)
    assert compensation.corrections
    assert torch.isfinite(torch.tensor(pruned.divergence(compensation.changes)))
