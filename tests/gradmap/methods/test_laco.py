"""LaCo's walk by hand, what it merges, and how alike the last hidden states are after that."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from gradmap.methods import laco
from gradmap.methods.laco import similarity_of, walk
from gradmap.methods.selection import Selection, Subject
from gradmap.model.corrections import weight_of
from gradmap.model.sublayers import Pair, sublayers_of
from tests.conftest import inside
from tests.gradmap.named_methods import make_scorer, repair
from tests.gradmap.removals import pairs
from tests.gradmap.repairs import prune
from tests.gradmap.subjects import subject_of


def of_layers(layers, count, protected=()):
    """A subject of which nothing but its size is looked at."""
    model: Any = SimpleNamespace(layers=[None] * layers)
    return Subject(model, None, count=count, protected=frozenset(protected))


class Notebook:
    """Finds some removals alike, others not, and notes what it was asked."""

    def __init__(self, alike):
        self.alike, self.asked = [pairs(*removed) for removed in alike], []

    def __call__(self, removed):
        self.asked.append(removed)
        return 0.8 if removed in self.alike else 0.6


def test_the_walk_is_that_of_the_paper():
    """Four layers become one at a time. Behind a merger it goes on two layers further to the
    front, in what is left, and otherwise one."""
    similarity = Notebook([(8, 9, 10), (8, 9, 10, 5, 6, 7)])
    removed = walk(of_layers(12, count=11), (), similarity, threshold=0.7)
    assert removed == pairs(8, 9, 10, 5, 6, 7)
    first = (8, 9, 10)
    both = (*first, 5, 6, 7)
    expected = [
        (9, 10, 11),  # into 8
        first,  # into 7
        (*first, 6, 7, 11),  # into 5: 7 is two in front of what is now the last but one
        both,  # into 4
        (*both, 3, 4, 11),  # into 2
        (*both, 2, 3, 4),  # into 1; layer 0 takes none
    ]
    assert similarity.asked == [pairs(*each) for each in expected]


def test_a_walk_ends_where_enough_went_and_the_next_goes_on_from_there():
    similarity = Notebook([(8, 9, 10)])
    subject = of_layers(12, count=2)
    removed = walk(subject, (), similarity, threshold=0.7)
    assert removed == pairs(8, 9, 10)
    assert walk(subject, removed, similarity, threshold=0.5) == removed
    assert len(similarity.asked) == 2
    assert walk(of_layers(12, count=4), removed, similarity, 0.5) == pairs(8, 9, 10, 6, 7, 11)


def test_what_is_left_in_the_end_is_merged_though_it_is_less_than_a_block():
    assert walk(of_layers(7, count=6), (), Notebook([]), threshold=0.5) == pairs(4, 5, 6, 2, 3)


def test_protected_layers_are_not_merged_nor_what_is_behind_them():
    """The walk begins where as many as anywhere can be merged."""
    similarity = Notebook([])
    walk(of_layers(9, count=3, protected=(0, 6, 8)), (), similarity, threshold=0.7)
    assert similarity.asked == [pairs(3, 4, 5), pairs(2, 3, 4)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_differences_of_a_run_are_added_to_the_layer_before_it(picos, input_ids, family):
    pruned = prune(picos[family], input_ids, removed=pairs(3, 2))
    corrections = repair("laco", pruned).corrections
    maps = dict(pruned.model.linear_maps(sublayers_of(range(5))))
    assert {one.place for one in corrections} == {place for place in maps if place.layer == 1}
    for one in corrections:
        own, first, second = (
            weight_of(maps[one.place._replace(layer=layer)]) for layer in (1, 2, 3)
        )
        merged = own + (first - own) + (second - own)
        torch.testing.assert_close(own + inside(one).matrix, merged, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_similarity_is_that_of_a_model_with_merged_weights(picos, input_ids):
    pico = picos["llama"]
    dense, merged = pico.load(), pico.load()
    layers = merged.model.layers
    for name, module in layers[1].named_modules():
        if isinstance(module, torch.nn.Linear):
            others = [layers[layer].get_submodule(name).weight for layer in (2, 3)]
            module.weight.copy_(sum(others) - module.weight)
    del layers[2:4]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    before, after = (
        model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        for model in (dense, merged)
    )
    expected = cosine_similarity(before.flatten(1), after.flatten(1), dim=1).mean().item()
    similarity = similarity_of(subject_of(pico, input_ids))
    assert similarity(pairs(2, 3)) == pytest.approx(expected, rel=1e-6)  # cosines are of float32
    assert similarity(()) == pytest.approx(1, rel=1e-6)


def test_the_threshold_falls_until_enough_layers_are_merged(picos, input_ids, monkeypatch):
    """Random layers have little in common, so that it falls far; no merger is tried twice."""
    tried = []
    collapse = laco.collapsed
    monkeypatch.setattr(
        laco,
        "collapsed",
        lambda subject, removed: (tried.append(removed), collapse(subject, removed))[1],
    )
    scorer = make_scorer("laco", subject_of(picos["llama"], input_ids, count=2))
    scores = scorer.score(Selection(()), lambda n: None)
    assert tried == [pairs(2, 3, 4)]
    assert sorted(scores, key=scores.get) == list(pairs(2, 3, 4))
    assert Pair.of_layer(1) not in scores  # nothing is merged into the first
