"""A model as a sequence of sublayers: which can go, what is left, and that it computes what the two
halves of its layers do."""

import json

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from pydantic import TypeAdapter, ValidationError

from gradmap.model.configs import prune_config
from gradmap.model.layerwise import logits_from, passes, record_layer_calls, run_layers
from gradmap.model.sublayers import (
    JoinedLayer,
    Pair,
    Part,
    are_neighbours,
    candidates,
    joined_layers,
    sublayers_left,
    sublayers_of,
)
from tests.gradmap.removals import attention, ffn, pairs


def test_candidates_are_layers_or_any_neighbours():
    left = sublayers_of(range(3))
    assert candidates(left, "layer") == list(pairs(0, 1, 2))
    assert candidates(left, "pair") == list(pairs(0, "M0+A1", 1, "M1+A2", 2))


def test_what_is_left_is_joined():
    assert joined_layers(4, pairs("M0+A1", 2)) == [JoinedLayer(0, 1), JoinedLayer(3, 3)]
    left = sublayers_left(4, pairs("M0+A1"))
    assert candidates(left, "layer")[0] == Pair.parse("A0+M1")
    assert joined_layers(4, pairs("M0+A1", "A0+M1")) == [JoinedLayer(2, 2), JoinedLayer(3, 3)]


def test_what_does_not_alternate_is_no_model():
    with pytest.raises(ValueError, match="alternate"):
        joined_layers(3, [Pair(ffn(0), attention(2))])


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ((1, 2), True),
        ((1, "M0+A2"), True),
        (("M0+A2", 1), False),
        ((1, 1), False),
        ((1, "M1+A2"), False),
        ((4,), False),
        (("M3+A4",), False),
    ],
)
def test_pairs_are_neighbours_in_what_is_left(order, expected):
    assert are_neighbours(4, pairs(*order)) is expected


@pytest.mark.parametrize("written", [7, "M7+A8", "A3+M5"])
def test_pairs_are_read_as_they_are_written(written):
    pair = Pair.parse(written)
    as_json = TypeAdapter(list[Pair]).dump_json([pair])
    assert json.loads(as_json) == [written]
    assert TypeAdapter(list[Pair]).validate_json(as_json) == [pair]
    scores = TypeAdapter(dict[Pair, float])
    assert scores.validate_json(scores.dump_json({pair: 0.5})) == {pair: 0.5}


@pytest.mark.parametrize("written", ["A7", "M7+M8", "A8+M7", "M7+A", "-1", "M7+A8+M8", 1.5, None])
def test_what_is_no_pair_is_refused(written):
    with pytest.raises(ValidationError):
        TypeAdapter(list[Pair]).validate_python([written])


@torch.no_grad()
def test_sublayers_add_up_to_their_layer(pico, input_ids):
    model = pico.layered()
    together = run_layers(model, input_ids)
    *_, (_, apart) = passes(model, input_ids, "pair")
    assert torch.equal(apart, together)


@torch.no_grad()
def test_a_sublayer_has_the_parameters_of_its_own(pico):
    model = pico.layered()
    for layer in model.layers:
        halves = [set(model.sublayer(layer, part).parameters()) for part in Part]
        assert halves[0].isdisjoint(halves[1])
        assert set.union(*halves) == set(layer.parameters())
        assert min(map(len, halves)) > 1  # a norm and a map at least


@torch.no_grad()
def test_a_shifted_pair_leaves_one_layer_of_two(pico, input_ids):
    """By hand: the attention of layer 0, and then the FFN of layer 1."""
    model = pico.layered()
    dense = model.network(input_ids=input_ids).logits
    hidden, calls = record_layer_calls(model, input_ids)
    for index, (layer, call) in enumerate(zip(model.layers, calls, strict=True)):
        parts = {0: [Part.ATTENTION], 1: [Part.FFN]}.get(index, list(Part))
        for part in parts:
            hidden = call.run(model.sublayer(layer, part), hidden)
    expected = logits_from(model, hidden, input_ids)
    with model.without(pairs("M0+A1")):
        assert len(model.layers) == len(calls) - 1
        torch.testing.assert_close(model.network(input_ids=input_ids).logits, expected)
        # with a cache, each attention has a slot of its own
        first = model.network(input_ids=input_ids[:, :-1], use_cache=True)
        last = model.network(input_ids=input_ids[:, -1:], past_key_values=first.past_key_values)
        torch.testing.assert_close(last.logits[:, 0], expected[:, -1])
    assert torch.equal(model.network(input_ids=input_ids).logits, dense)


def test_what_a_config_says_of_layers_follows_their_sublayers(picos):
    config = picos["gemma3_text"].checkpoint.config
    config["layer_types"] = ["full_attention", "sliding_attention"] * 2
    pruned = prune_config(config | {"num_hidden_layers": 4}, pairs("M0+A1"))
    assert pruned["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]


def test_which_layers_have_experts_follows_the_ffns(picos):
    config = picos["qwen2_moe"].checkpoint.config
    config |= {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": []}
    config.pop("layer_types", None)
    pruned = prune_config(config, pairs("M0+A1"))  # FFNs 1, 2, 3, of which 1 and 3 have experts
    assert (pruned["decoder_sparse_step"], pruned["mlp_only_layers"]) == (1, [1])


@torch.no_grad()
def test_a_layer_that_accelerate_wraps_is_joined_and_cut(picos, input_ids):
    """As where layers are on several GPUs: the wrapper is bound to the layer that it was made
    for."""
    plain, wrapped = (picos["llama"].layered() for _ in range(2))
    for layer in wrapped.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    for unit in ("layer", "pair"):
        *_, (_, expected) = passes(plain, input_ids, unit)
        *_, (_, actual) = passes(wrapped, input_ids, unit)
        assert torch.equal(actual, expected)
    with plain.without(pairs("M0+A1")), wrapped.without(pairs("M0+A1")):
        assert torch.equal(run_layers(wrapped, input_ids), run_layers(plain, input_ids))


@torch.no_grad()
def test_who_watches_a_layer_sees_what_its_ffn_leaves(picos, input_ids):
    model = picos["llama"].layered()
    hidden, calls = record_layer_calls(model, input_ids)
    watched, seen = model.layers[1], []
    watched.register_forward_hook(lambda *args: seen.append(args[-1]))
    calls[1].run(model.sublayer(watched, Part.ATTENTION), hidden)
    assert seen == []
    behind = calls[1].run(model.sublayer(watched, Part.FFN), hidden)
    assert torch.equal(seen.pop(), behind)
    with model.without(pairs("M0+A1")):
        calls[0].run(model.layers[0], hidden)
    assert len(seen) == 1
