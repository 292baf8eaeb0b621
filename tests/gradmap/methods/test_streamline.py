"""LLM-Streamline's layer in place of a block: what it is trained to, and a step by hand."""

import pytest
import torch

from gradmap.methods import streamline
from gradmap.methods.streamline import relative_errors, replace_runs
from gradmap.model.corrections import weight_of
from gradmap.model.sublayers import sublayers_of
from tests.conftest import inside
from tests.gradmap.named_methods import repair
from tests.gradmap.removals import ffn, pairs
from tests.gradmap.repairs import prune, states_behind


def test_an_error_is_relative_to_what_is_wanted():
    wanted = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    given = torch.tensor([[[3.0, 5.0], [1.0, 0.0]]])
    expected = torch.tensor([[1 / 25, (1 + 4) / 4]])
    torch.testing.assert_close(relative_errors(given, wanted), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_step_is_that_of_adam_towards_what_the_block_gave(picos, input_ids, monkeypatch, family):
    """Its first one, from nothing: each number moves by the rate against its gradient's sign."""
    monkeypatch.setattr(streamline, "EPOCHS", 1)
    monkeypatch.setattr(streamline, "STEP_SAMPLES", len(input_ids))
    pruned = prune(picos[family], input_ids, removed=pairs(2, 3))
    model = pruned.model
    wanted = states_behind(model, input_ids)[ffn(3)]
    maps = dict(model.linear_maps(sublayers_of([1])))
    for module in maps.values():
        module.weight.requires_grad_(True)
    with model.without(pairs(2, 3)):
        captured = []
        hook = model.layers[1].register_forward_hook(lambda *args: captured.append(args[-1]))
        model.network(input_ids=input_ids, use_cache=False)
        hook.remove()
    given = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
    relative_errors(given, wanted).mean().backward()
    gradients = {place: module.weight.grad for place, module in maps.items()}
    for module in maps.values():
        module.weight.requires_grad_(False)
    corrections = repair("streamline", pruned).corrections
    assert {one.place for one in corrections} == set(maps)
    for one in corrections:
        gradient = gradients[one.place]
        gradient = gradient if weight_of(maps[one.place]) is maps[one.place].weight else gradient.mT
        expected = -2e-4 * gradient / (gradient.abs() + 1e-8)
        # where the gradient is next to nothing, rounding is what Adam sees
        torch.testing.assert_close(inside(one).matrix, expected, rtol=1e-4, atol=1e-8)


def test_a_trained_layer_gives_more_nearly_what_the_block_gave(picos, input_ids):
    pruned = prune(picos["llama"], input_ids, removed=pairs(1, 3))
    compensation = replace_runs(pruned)
    assert {one.place.layer for one in compensation.corrections} == {0, 2}
    model = pruned.model
    dense = states_behind(model, input_ids)
    plain = states_behind(model, input_ids, pruned.removed)
    trained = states_behind(model, input_ids, pruned.removed, compensation.changes)
    assert len(compensation.changes) == len(compensation.corrections)
    for kept, last in ((0, 1), (2, 3)):
        before, after = (
            relative_errors(states[ffn(kept)], dense[ffn(last)]).mean()
            for states in (plain, trained)
        )
        assert after < before


def test_the_second_layer_is_trained_on_what_the_first_makes_of_it(picos, input_ids, monkeypatch):
    seen = []
    train = streamline.trained_layer

    def watch(pruned, layer, entering, wanted):
        seen.append(entering.hidden)
        return train(pruned, layer, entering, wanted)

    monkeypatch.setattr(streamline, "trained_layer", watch)
    pruned = prune(picos["llama"], input_ids, removed=pairs(1, 3))
    first = [one for one in replace_runs(pruned).corrections if one.place.layer == 0]
    changes = {one.place: (one.change,) for one in first if one.accepted}
    states = states_behind(pruned.model, input_ids, pruned.removed, changes)
    torch.testing.assert_close(seen[1], states[ffn(0)], rtol=1e-9, atol=1e-12)
