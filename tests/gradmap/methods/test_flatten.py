"""FFNs side by side: which channels stay, where they go, and what the layer then computes."""

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.methods.features import Walks
from gradmap.methods.flatten import (
    channel_scores,
    choose_channels,
    flatten_runs,
    moved_channels,
    require_no_biases,
)
from gradmap.methods.sequential import refit_around_runs
from gradmap.model.corrections import Update, gather_changes, weight_of
from tests.conftest import inside
from tests.gradmap.named_methods import repair
from tests.gradmap.removals import attention, ffn, pairs
from tests.gradmap.repairs import prune, states_behind

PLAIN = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma"]


def test_channels_that_stay_keep_their_places_and_others_fill_the_gaps():
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0], [0.0, 6.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    assert choose_channels(scores).tolist() == [0, 5, 2, 8]


@pytest.mark.parametrize("family", PLAIN)
def test_moved_channels_add_what_they_added_behind_their_own_norms(picos, input_ids, family):
    """With the second half of two FFNs' channels, the layer adds what these make of its input."""
    model = picos[family].layered()
    places = weight_of(model.down_projection(1)).shape[1]
    channels = torch.cat([torch.arange(places // 2), torch.arange(places // 2) + places])
    moved = gather_changes(moved_channels(model, [ffn(1), ffn(2)], channels))
    entering = states_behind(model, input_ids)[attention(1)]

    def added(layer, kept):
        """What some channels of an FFN add."""
        down = weight_of(model.down_projection(layer))
        others = torch.ones(places, dtype=torch.bool)
        others[kept] = False
        only = {model.output_of(ffn(layer)): (Update(-down * others),)}
        with model.changed(only):
            return model.sublayer(model.layers[layer], 1)(entering) - entering

    half = range(places // 2)
    expected = added(1, half) + added(2, half)
    with model.changed(moved):
        actual = model.sublayer(model.layers[1], 1)(entering) - entering
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_scores_of_channels_are_what_they_add(picos, input_ids):
    """By the definition, from whole passes: |W_down's column| times the root of the sum over tokens
    of (channel / |hidden state|)^2, on what enters the FFN that stays."""
    pruned = prune(picos["llama"], input_ids, removed=pairs(2))
    walks = Walks.start(pruned)
    walks.pruned.go_to(ffn(1), {})
    entering = states_behind(pruned.model, input_ids, pairs(2))[attention(1)]
    expected = []
    for layer in (1, 2):
        module = pruned.model.layers[layer]
        read = module.post_attention_layernorm(entering)
        channels = module.mlp.act_fn(module.mlp.gate_proj(read)) * module.mlp.up_proj(read)
        squares = (channels / entering.norm(dim=-1, keepdim=True)).square().sum(dim=(0, 1))
        expected.append(squares.sqrt() * module.mlp.down_proj.weight.norm(dim=0))
    actual = channel_scores(pruned, [ffn(1), ffn(2)], walks)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-9, atol=0)


def test_what_is_better_on_held_out_samples_is_done(picos, input_ids):
    pruned = prune(picos["llama"], input_ids, removed=pairs(2, 3))
    refit = refit_around_runs(pruned).corrections[0]
    flattened = flatten_runs(pruned).corrections
    before_cut = [one for one in flattened if one.place.layer == 1]
    assert before_cut[0].held_out_divergence_after <= refit.held_out_divergence_after
    # where removed layers add next to nothing, all that is left to do is a refit
    for layer in (2, 3):
        pruned.model.layers[layer].mlp.down_proj.weight.mul_(1e-3)
    first, *_ = flatten_runs(pruned).corrections
    expected = refit_around_runs(pruned).corrections[0]
    assert first.place == expected.place
    torch.testing.assert_close(inside(first).matrix, inside(expected).matrix)


def test_channels_do_not_move_behind_a_norm_that_takes_what_they_read_away(picos, input_ids):
    pruned = prune(picos["llama"], input_ids, removed=pairs(2))
    pruned.model.layers[1].post_attention_layernorm.weight[3] = 0
    with pytest.raises(UserError, match="the FFN of layer 1 has a gain of 0, so that no channel"):
        flatten_runs(pruned)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_biases_cannot_move(picos, input_ids, family):
    with pytest.raises(UserError, match="FFN has biases"):
        repair("flatten", prune(picos[family], input_ids))
    with pytest.raises(UserError, match="FFN has biases"):
        require_no_biases(picos[family].layered())
