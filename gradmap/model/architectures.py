"""The only place that knows where each model family keeps its layers, and what removing one must
change.

To support a family, add its `model_type` to `ARCHITECTURES`; the contract tests then run on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING

from gradmap.common.errors import UserError
from gradmap.model.sublayers import Pair, Part, Sublayer, joined_layers


@dataclass(frozen=True)
class Architecture:
    """Names of one model family.

    layers: dotted path of the layer list inside `...ForCausalLM`. down_projection: dotted path,
    inside a layer, of the last linear map of the FFN; of a mixture of experts, of the
        whole FFN, whose last maps are the down projections of all experts.
    attention_output: dotted path, inside a layer, of the last linear map of the attention.
    feed_forward: what of a layer's children is of its FFN, with the norms that belong to it; the
        others are of its attention.
    expert_down_projections: of a mixture of experts, the pattern of their tensor names inside a
    layer. layer_count_key: the config key that holds the number of layers. transposed_linear:
    weights are stored (d_in, d_out), as in GPT-2's Conv1D, and not (d_out, d_in). uncorrectable:
    why no W' can be folded into the down projection, if that is so.
    """

    layers: str
    down_projection: str
    attention_output: str = "self_attn.o_proj"
    feed_forward: tuple[str, ...] = ("post_attention_layernorm", "mlp")
    expert_down_projections: str | None = None
    layer_count_key: str = "num_hidden_layers"
    transposed_linear: bool = False
    uncorrectable: str | None = None

    def layer_list(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @contextmanager
    def layers_replaced(self, model: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
        """Gives the model another list of layers while the block runs."""
        parent_path, _, list_name = self.layers.rpartition(".")
        parent = model.get_submodule(parent_path)
        original = self.layer_list(model)
        try:
            setattr(parent, list_name, layers)
            yield
        finally:
            setattr(parent, list_name, original)

    def part_of(self, name: str) -> Part:
        """Which sublayer a path or a tensor name inside a layer belongs to. What leaves the layer,
        whose path is empty, leaves its FFN."""
        child = name.partition(".")[0]
        return Part.FFN if child in ("", *self.feed_forward) else Part.ATTENTION

    def sublayer_of(self, layer: int, name: str) -> Sublayer:
        """The one of a layer that a path or a tensor name inside it belongs to."""
        return Sublayer(layer, self.part_of(name))

    def output_map(self, part: Part) -> str:
        """The path, inside a layer, of the last linear map of a sublayer."""
        return self.attention_output if part is Part.ATTENTION else self.down_projection

    def down_projection_of(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.down_projection)

    def down_projection_weights(self, layer: nn.Module) -> list[nn.Parameter]:
        """The weights that W' multiplies, as transformers holds them: those of all experts are one
        stacked tensor."""
        module = self.down_projection_of(layer)
        if self.expert_down_projections is None:
            return [module.get_parameter("weight")]
        endings = ("down_proj", "down_proj.weight")
        return [
            parameter for name, parameter in module.named_parameters() if name.endswith(endings)
        ]

    def is_down_projection(self, name: str) -> bool:
        """Whether W' is folded into the tensor of this name (inside a layer)."""
        if self.expert_down_projections is None:
            return name == f"{self.down_projection}.weight"
        return re.fullmatch(self.expert_down_projections, name) is not None

    def is_weight_of(self, target: str, name: str) -> bool:
        """Whether the tensor of this name (inside a layer) is the weight of a linear map (its path
        inside a layer)."""
        return (
            self.is_down_projection(name)
            if target == self.down_projection
            else name == f"{target}.weight"
        )

    def is_part_of(self, target: str, name: str) -> bool:
        """Whether it is the weight or the bias of the map."""
        return self.is_weight_of(target, name) or name == f"{target}.bias"

    def parts_of(self, layer: nn.Module, target: str) -> list[nn.Parameter]:
        """Weight and bias of a map of a layer in memory; several weights for the down projections
        of experts."""
        module = layer.get_submodule(target)
        is_down_projection = target == self.down_projection
        weights = (
            self.down_projection_weights(layer)
            if is_down_projection
            else [module.get_parameter("weight")]
        )
        bias: nn.Parameter | None = getattr(module, "bias", None)
        return weights if bias is None else [*weights, bias]

    def parse_tensor_name(self, name: str) -> tuple[str, int, str] | None:
        """Splits `model.layers.7.mlp.up_proj.weight` into (`model.layers`, 7,
        `mlp.up_proj.weight`).

        Returns None for a tensor outside the layers. Checkpoints saved from the bare decoder leave
        out leading parts of the path (`h.0.…` for `transformer.h.0.…`), so any suffix of it counts.
        """
        parts = self.layers.split(".")
        suffixes = "|".join(re.escape(".".join(parts[start:])) for start in range(len(parts)))
        match = re.fullmatch(rf"({suffixes})\.(\d+)\.(.+)", name)
        return (match[1], int(match[2]), match[3]) if match else None


_LLAMA_LIKE = Architecture(layers="model.layers", down_projection="mlp.down_proj")
_SANDWICH_NORM = replace(
    _LLAMA_LIKE,
    feed_forward=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    uncorrectable="a norm follows the down projection, so it is no linear map any more",
)
_QWEN_MOE = Architecture(
    layers="model.layers",
    down_projection="mlp",
    expert_down_projections=r"mlp\.((experts\.\d+|shared_expert)\.)?down_proj\.weight",
)

ARCHITECTURES = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "phi3": replace(
        _LLAMA_LIKE, feed_forward=("post_attention_layernorm", "mlp", "resid_mlp_dropout")
    ),
    "gemma": _LLAMA_LIKE,
    "gemma2": _SANDWICH_NORM,
    "gemma3_text": _SANDWICH_NORM,
    "mixtral": Architecture(
        layers="model.layers",
        down_projection="mlp",
        expert_down_projections=r"block_sparse_moe\.experts\.\d+\.w2\.weight",
        # as a checkpoint calls it, and as transformers does
        feed_forward=("post_attention_layernorm", "block_sparse_moe", "mlp"),
    ),
    "qwen2_moe": _QWEN_MOE,
    "qwen3_moe": _QWEN_MOE,
    "opt": Architecture(
        layers="model.decoder.layers",
        down_projection="fc2",
        attention_output="self_attn.out_proj",
        feed_forward=("final_layer_norm", "fc1", "activation_fn", "fc2"),
    ),
    "gpt2": Architecture(
        layers="transformer.h",
        down_projection="mlp.c_proj",
        attention_output="attn.c_proj",
        feed_forward=("ln_2", "mlp"),
        layer_count_key="n_layer",
        transposed_linear=True,
    ),
}

# Config keys that hold one entry per layer, and which sublayer it describes; every other list of
# that length is refused as unknown.
_PER_LAYER_KEYS = {
    "layer_types": Part.ATTENTION,
    "no_rope_layers": Part.ATTENTION,
    "mlp_layer_types": Part.FFN,
}
# Lists that may happen to be as long as the model is deep.
_OTHER_LISTS = ("architectures", "mlp_only_layers", "eos_token_id")

# What makes a layer depend on its own position or on another layer, and why removal would then be
# wrong.
_UNSAFE: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("num_kv_shared_layers", bool, "its layers share keys and values"),
    ("scale_attn_by_inverse_layer_idx", bool, "its attention is scaled by the layer's position"),
    (
        "do_layer_norm_before",
        lambda value: value is False,
        "a norm follows the down projection (post-norm OPT)",
    ),
)


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Looks up the family of a Hugging Face config; raises UserError if it is unknown or unsafe to
    prune."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"Model type {model_type!r} is not supported; supported are {known}.")
    for key, is_unsafe, reason in _UNSAFE:
        if key in config and is_unsafe(config[key]):
            raise UserError(
                f"This {model_type} model cannot be pruned by layers: {reason} "
                f"({key}={config[key]})."
            )
    return ARCHITECTURES[model_type]


def layer_count(config: dict[str, Any]) -> int:
    return int(config[architecture_of(config).layer_count_key])


def prune_config(config: dict[str, Any], removed: Sequence[Pair]) -> dict[str, Any]:
    """Returns a copy of a config that describes what is left: every per-layer field follows the
    sublayer that it is about.

    Patterns that follow from a layer's position (every other one slides, every second one is
    sparse) are spelled out. Raises UserError for a list with one entry per layer whose meaning is
    not known.
    """
    layers = layer_count(config)
    kept = joined_layers(layers, removed)
    pruned = deepcopy(config)
    pruned[architecture_of(config).layer_count_key] = len(kept)
    for key, value in (config | _explicit_layer_types(config)).items():
        if key in _PER_LAYER_KEYS and value is not None:
            pruned[key] = [value[layer[_PER_LAYER_KEYS[key]]] for layer in kept]
        elif isinstance(value, list) and len(value) == layers and key not in _OTHER_LISTS:
            raise UserError(
                f"Config field {key!r} has one entry per layer and is not known; removal is not "
                "safe."
            )
    if config.get("max_window_layers") is not None:  # Qwen: layers below it use full attention
        full = config["max_window_layers"]
        pruned["max_window_layers"] = sum(layer.attention < full for layer in kept)
    # Qwen-MoE: every n-th layer has experts, but for those listed
    if "decoder_sparse_step" in config:
        step, dense = config["decoder_sparse_step"], config.get("mlp_only_layers") or []
        sparse = [layer.ffn not in dense and (layer.ffn + 1) % step == 0 for layer in kept]
        pruned["decoder_sparse_step"] = 1
        pruned["mlp_only_layers"] = [
            position for position, is_sparse in enumerate(sparse) if not is_sparse
        ]
    return pruned


def _explicit_layer_types(config: dict[str, Any]) -> dict[str, Any]:
    """The kind of attention of every layer, where transformers derives it from the layer's
    position."""
    if config.get("layer_types") is not None or config["model_type"] not in CONFIG_MAPPING:
        return {}
    parsed = CONFIG_MAPPING[config["model_type"]](**config)
    return (
        {"layer_types": parsed.layer_types}
        if getattr(parsed, "layer_types", None) is not None
        else {}
    )
