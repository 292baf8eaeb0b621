"""Removing layers keeps every family's config, KV cache slots and forward pass consistent."""

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.model.architectures import architecture_of
from gradmap.model.configs import complete_config, prune_config
from gradmap.model.layered import LayeredModel
from tests.families import LAYERS, MORE_CONFIGS, PICO_CONFIGS, config_of
from tests.gradmap.removals import pairs


def test_removed_layers_come_back(pico, input_ids):
    model = pico.load()
    before = model(input_ids=input_ids).logits
    config = model.config.to_dict()
    with LayeredModel.of(model).without(pairs(0, 3)):
        assert len(pico.architecture.layer_list(model)) == LAYERS - 2
        assert not torch.equal(model(input_ids=input_ids).logits, before)
    assert model.config.to_dict() == config
    assert torch.equal(model(input_ids=input_ids).logits, before)


def test_the_smaller_model_generates_the_same_with_and_without_its_cache(pico, input_ids):
    model = pico.load()
    with LayeredModel.of(model).without(pairs(1, 2)):
        texts = [
            model.generate(input_ids[:2], max_new_tokens=8, do_sample=False, use_cache=c)
            for c in (True, False)
        ]
    assert torch.equal(texts[0], texts[1])


def test_layers_left_out_are_skipped_in_the_forward_pass(picos, input_ids):
    """The residual stream after the kept layers is what running them one by one gives."""
    pico = picos["llama"]
    model = pico.load()
    layers = list(pico.architecture.layer_list(model))
    with LayeredModel.of(model).without(pairs(1, 3)):
        actual = model(input_ids=input_ids).logits
    for index in (1, 3):  # a layer whose outputs are zero adds nothing to the residual stream
        layers[index].self_attn.o_proj.weight.zero_()
        layers[index].mlp.down_proj.weight.zero_()
    torch.testing.assert_close(actual, model(input_ids=input_ids).logits, rtol=1e-12, atol=1e-12)


def test_per_layer_config_fields_follow():
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "layer_types": [
            "full_attention",
            "full_attention",
            "sliding_attention",
            "sliding_attention",
        ],
        "max_window_layers": 2,
    }
    pruned = prune_config(config, pairs(0, 2))
    assert pruned["num_hidden_layers"] == 2
    assert pruned["layer_types"] == ["full_attention", "sliding_attention"]
    assert pruned["max_window_layers"] == 1
    assert config["num_hidden_layers"] == 4


def test_kinds_of_attention_that_follow_from_the_position_are_spelled_out():
    """As Gemma 2 and 3 checkpoints are published: without layer_types."""
    gemma2 = prune_config({"model_type": "gemma2", "num_hidden_layers": 4}, pairs(0))
    assert gemma2["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    gemma3 = prune_config(
        {"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window_pattern": 2}, pairs(1)
    )
    assert gemma3["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]


def test_layers_with_experts_keep_them():
    """Every second layer has experts, but not layer 3: 1 and 5 do."""
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 6,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    }
    pruned = prune_config(config, pairs(0, 2))
    assert pruned["decoder_sparse_step"] == 1
    assert pruned["mlp_only_layers"] == [1, 2]  # 3 and 4; the kept layers are 1, 3, 4, 5


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mystery_per_layer": [1, 2, 3, 4]}, "mystery_per_layer"),
        ({"num_kv_shared_layers": 2}, "share keys and values"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "norm follows the down projection"),
        ({"model_type": "gpt2", "n_layer": 4, "scale_attn_by_inverse_layer_idx": True}, "position"),
    ],
)
def test_unsafe_removals_are_refused(extra, message):
    with pytest.raises(UserError, match=message):
        prune_config({"model_type": "llama", "num_hidden_layers": 4} | extra, pairs(1))


def test_tensor_names_are_split_with_or_without_leading_parts():
    gpt2 = architecture_of(PICO_CONFIGS["gpt2"] | {"model_type": "gpt2"})
    assert gpt2.parse_tensor_name("transformer.h.11.mlp.c_proj.weight") == (
        "transformer.h",
        11,
        "mlp.c_proj.weight",
    )
    assert gpt2.parse_tensor_name("h.0.ln_1.bias") == ("h", 0, "ln_1.bias")
    assert gpt2.parse_tensor_name("transformer.wte.weight") is None
    opt = architecture_of(PICO_CONFIGS["opt"] | {"model_type": "opt"})
    assert opt.parse_tensor_name("decoder.layers.3.fc2.bias") == (
        "decoder.layers",
        3,
        "fc2.bias",
    )


@pytest.mark.parametrize("family", [*PICO_CONFIGS, *MORE_CONFIGS])
def test_a_config_that_is_completed_stays_what_was_read(family):
    config = {"model_type": family, **config_of(family)}
    complete_config(config)
    assert config == {"model_type": family, **config_of(family)}
