"""What is found in a small model, and that a removal is tried on it before a large one is
touched."""

from dataclasses import replace
from inspect import unwrap

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.model import proof
from gradmap.model.architectures import architecture_of
from gradmap.model.corrections import Projection
from gradmap.model.discovery import find_names
from gradmap.model.layer_runs import runs_of_layers
from gradmap.model.norms import Norm
from gradmap.model.proof import require_prunable
from gradmap.model.small_model import VOCABULARY, build_model, few_layers, small_config, small_ids
from tests.families import LAYERS, MORE_CONFIGS, PICO_CONFIGS

ALL_CONFIGS = PICO_CONFIGS | MORE_CONFIGS
LLAMA_LIKE = ("mlp.down_proj", "self_attn.o_proj", ("post_attention_layernorm", "mlp"))
SANDWICH = ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")
# The last maps of FFN and attention, and the children of the FFN as transformers calls them.
NAMES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"), LLAMA_LIKE),
    "phi3": (*LLAMA_LIKE[:2], ("post_attention_layernorm", "mlp", "resid_mlp_dropout")),
    "gemma2": (*LLAMA_LIKE[:2], SANDWICH),
    "gemma3_text": (*LLAMA_LIKE[:2], SANDWICH),
    "olmo2": (*LLAMA_LIKE[:2], ("mlp", "post_feedforward_layernorm")),
    "mixtral": ("mlp", "self_attn.o_proj", ("post_attention_layernorm", "mlp")),
    "qwen2_moe": ("mlp", "self_attn.o_proj", ("post_attention_layernorm", "mlp")),
    "deepseek_v3": ("mlp", "self_attn.o_proj", ("post_attention_layernorm", "mlp")),
    "opt": ("fc2", "self_attn.out_proj", ("final_layer_norm", "fc1", "activation_fn", "fc2")),
    "gpt2": ("mlp.c_proj", "attn.c_proj", ("ln_2", "mlp")),
    "starcoder2": ("mlp.c_proj", "self_attn.o_proj", ("post_attention_layernorm", "mlp")),
    "apertus": ("mlp.down_proj", "self_attn.o_proj", ("feedforward_layernorm", "mlp")),
}


def config_of(family, **changes):
    return {"model_type": family, **ALL_CONFIGS[family], **changes}


@pytest.mark.parametrize("family", NAMES)
def test_the_parts_of_a_layer_are_found(family):
    """By hand, from the code of the families in transformers."""
    found = architecture_of(config_of(family))
    down_projection, attention_output, feed_forward = NAMES[family]
    assert found.down_projection == down_projection
    assert found.attention_output == attention_output
    assert found.feed_forward[: len(feed_forward)] == feed_forward


def test_where_the_layers_are_and_how_weights_lie_is_found():
    gpt2, opt = (architecture_of(config_of(family)) for family in ("gpt2", "opt"))
    assert (gpt2.layers, gpt2.transposed_linear) == ("transformer.h", True)
    assert (opt.layers, opt.transposed_linear) == ("model.decoder.layers", False)


def test_the_experts_down_projections_are_found_as_checkpoints_call_them():
    mixtral = architecture_of(config_of("mixtral"))
    assert mixtral.is_down_projection("block_sparse_moe.experts.11.w2.weight")
    assert not mixtral.is_down_projection("block_sparse_moe.experts.11.w1.weight")
    assert mixtral.part_of("block_sparse_moe.gate.weight") == mixtral.part_of("mlp.gate.weight")
    deepseek = architecture_of(config_of("deepseek_v3"))
    down = ("mlp.experts.0.down_proj", "mlp.shared_experts.down_proj", "mlp.down_proj")
    assert all(deepseek.is_down_projection(f"{name}.weight") for name in down)
    assert not deepseek.is_down_projection("mlp.experts.0.up_proj.weight")


def test_what_is_added_to_the_hidden_state_may_be_multiplied():
    assert architecture_of(config_of("granite")).multipliers == (0.22, 0.22)
    assert architecture_of(config_of("llama")).multipliers == (1.0, 1.0)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "norm follows"),
        ("olmo2", "norm follows"),
        ("gpt_oss", "experts"),
        ("llama4_text", "experts of a layer in one tensor"),
    ],
)
def test_what_no_projection_can_correct_is_known(family, reason):
    assert reason in architecture_of(config_of(family)).uncorrectable


@pytest.mark.parametrize(
    ("family", "paths", "offset"),
    [
        ("gemma2", ("post_attention_layernorm", "post_feedforward_layernorm"), 1.0),
        ("gemma3_text", ("post_attention_layernorm", "post_feedforward_layernorm"), 1.0),
        ("olmo2", ("post_attention_layernorm", "post_feedforward_layernorm"), 0.0),
        ("exaone4", ("post_attention_layernorm", "post_feedforward_layernorm"), 0.0),
        ("glm4", ("post_self_attn_layernorm", "post_mlp_layernorm"), 0.0),
    ],
)
def test_the_norms_behind_maps_are_found_and_what_makes_their_gain(family, paths, offset):
    found = architecture_of(config_of(family))
    assert found.norms == tuple(Norm(path, offset) for path in paths)
    assert found.is_fitted


@pytest.mark.parametrize("family", ["llama", "granite", "gpt_oss"])
def test_without_norms_behind_maps_none_are_found(family):
    found = architecture_of(config_of(family))
    assert found.norms == (None, None)
    assert found.is_fitted == (found.uncorrectable is None)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("cohere", "read the same input"),
        ("falcon", "read the same input"),
        ("bloom", "adds the hidden state by itself"),
        ("mpt", "adds the hidden state by itself"),
        ("llama4_text", "return different things"),
    ],
)
def test_layers_whose_sublayers_are_not_in_a_row_are_known(family, reason):
    assert reason in architecture_of(config_of(family)).unpaired
    assert architecture_of(config_of("stablelm")).unpaired is None
    assert (
        "same input" in architecture_of(config_of("stablelm", use_parallel_residual=True)).unpaired
    )


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "seen"),
        [
            ({"model_type": "mystery"}, "no causal language model that transformers knows"),
            ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 4}, "no FFN behind"),
            ({"model_type": "bert", "is_decoder": True}, "does not end in a linear map"),
            (config_of("llama", hidden_act="mystery"), "no llama model"),
        ],
    )
    def test_say_what_was_seen(self, config, seen):
        with pytest.raises(UserError, match=seen):
            require_prunable(config)

    def test_a_model_that_cannot_be_made_small_is_not_made(self):
        wide = {"model_type": "bart", "d_model": 8192, "decoder_layers": 4, "encoder_layers": 4}
        with pytest.raises(UserError, match="not known what it calls its sizes"):
            architecture_of({**wide, "is_decoder": True, "is_encoder_decoder": False})


class TestExperts:
    @pytest.mark.parametrize(
        ("family", "routers", "apart"),
        [
            ("llama", [], True),
            ("qwen2_moe", [r"mlp\.gate", r"mlp\.shared_expert_gate"], True),
            ("deepseek_v3", [r"mlp\.gate"], True),
            ("mixtral", [r"block_sparse_moe\.gate", r"mlp\.gate"], False),
            ("gpt_oss", [r"mlp\.router"], False),
            ("llama4_text", [r"feed_forward\.router"], False),
        ],
    )
    def test_what_chooses_them_and_how_they_are_stored_is_found(self, family, routers, apart):
        found = architecture_of({"model_type": family} | config_of(family))
        assert list(found.routers) == routers
        assert found.experts_apart == apart


class TestProof:
    """What is found wrongly is noticed."""

    @pytest.mark.parametrize(
        ("family", "wrong"),
        [
            ("llama", {"feed_forward": ("mlp",)}),
            ("llama", {"multipliers": (1.0, 1.0), "transposed_linear": True}),
            ("mixtral", {"feed_forward": ("post_attention_layernorm", "mlp")}),
            ("gpt2", {"transposed_linear": False}),
            ("gemma2", {"norms": (Norm("post_attention_layernorm", 0.0),) * 2}),
            ("olmo2", {"norms": (Norm("post_feedforward_layernorm", 1.0),) * 2}),
            ("mixtral", {"expert_down_projections": r"block_sparse_moe\.experts\.\d+\.w1\.weight"}),
            ("deepseek_v3", {"expert_down_projections": r"mlp\.experts\.\d+\.down_proj\.weight"}),
        ],
    )
    def test_refuses_it(self, monkeypatch, family, wrong):
        config = config_of(family)
        found = replace(architecture_of(config), **wrong)
        monkeypatch.setattr(proof, "architecture_of", lambda config: found)
        with pytest.raises(UserError, match="cannot be pruned by layers: "):
            unwrap(proof._prove)(config)  # what was tried before is not tried again

    @pytest.mark.parametrize(
        "family", ["gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "glm4"]
    )
    def test_folds_another_gain_into_a_norm(self, family):
        require_prunable(config_of(family))

    def test_tries_models_in_which_no_layer_is_like_another(self):
        kinds = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
        require_prunable(config_of("olmo3", **kinds))

    def test_tries_a_correction_and_a_shifted_pair(self, monkeypatch):
        tried = []

        def note(model, stored, removed):
            tried.append((list(map(str, removed)), proof._a_change(model, removed)))

        monkeypatch.setattr(proof, "_try", note)
        require_prunable(config_of("llama", rms_norm_eps=1.02e-5))
        (layers, of_layers), (pairs, of_pairs) = tried
        assert (layers, pairs) == (["1"], ["M0+A1"])
        for changes, target in ((of_layers, "mlp.down_proj"), (of_pairs, "self_attn.o_proj")):
            ((place, (change,)),) = changes.items()
            assert (place.layer, place.target) == (0, target)
            assert isinstance(change, Projection)


class TestSmallModels:
    def test_keep_what_the_model_is(self):
        config = {
            **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 40},
        }
        small = small_config(config)
        assert small["hidden_size"] // small["num_attention_heads"] == 128
        assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 1)
        assert small["vocab_size"] == VOCABULARY
        assert few_layers(small)["num_hidden_layers"] == 3  # for they are all alike

    def test_have_layers_of_every_kind(self):
        few = few_layers(small_config(config_of("deepseek_v3", num_hidden_layers=12)))
        assert few["num_hidden_layers"] == 5  # of the two without experts and the ten with some
        assert few["first_k_dense_replace"] == 2

    def test_leave_random_numbers_as_they_were(self):
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        require_prunable(config_of("qwen3", rms_norm_eps=1.03e-5))
        assert torch.equal(torch.rand(2), expected)


@torch.no_grad()
def test_every_layer_is_looked_at():
    model = build_model(config_of("gpt2"))
    runs = runs_of_layers(model, "transformer.h", small_ids())
    assert len(runs) == LAYERS
    assert {find_names(run).attention for run in runs} == {"attn"}
