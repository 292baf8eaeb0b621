"""The only place that knows where each model family keeps its layers, and what removing one must change.

To support a family, add its `model_type` to `ARCHITECTURES`; the contract tests then run on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradmap.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """Names of one model family.

    layers: dotted path of the layer list inside `...ForCausalLM`.
    down_projection: dotted path, inside a layer, of the last linear map of the FFN.
    layer_count_key: the config key that holds the number of layers.
    transposed_linear: weights are stored (d_in, d_out), as in GPT-2's Conv1D, and not (d_out, d_in).
    """

    layers: str
    down_projection: str
    layer_count_key: str = "num_hidden_layers"
    transposed_linear: bool = False

    def layer_list(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def down_projection_of(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.down_projection)

    def parse_tensor_name(self, name: str) -> tuple[str, int, str] | None:
        """Splits `model.layers.7.mlp.up_proj.weight` into (`model.layers`, 7, `mlp.up_proj.weight`).

        Returns None for a tensor outside the layers. Checkpoints saved from the bare decoder leave out
        leading parts of the path (`h.0.…` for `transformer.h.0.…`), so any suffix of it counts.
        """
        parts = self.layers.split(".")
        suffixes = "|".join(re.escape(".".join(parts[start:])) for start in range(len(parts)))
        match = re.fullmatch(rf"({suffixes})\.(\d+)\.(.+)", name)
        return (match[1], int(match[2]), match[3]) if match else None


_LLAMA_LIKE = Architecture(layers="model.layers", down_projection="mlp.down_proj")

ARCHITECTURES = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "opt": Architecture(layers="model.decoder.layers", down_projection="fc2"),
    "gpt2": Architecture(
        layers="transformer.h", down_projection="mlp.c_proj", layer_count_key="n_layer", transposed_linear=True
    ),
}

# Config keys that hold one entry per layer; every other list of that length is refused as unknown.
_PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers")

# What makes a layer depend on its own position or on another layer, and why removal would then be wrong.
_UNSAFE: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("num_kv_shared_layers", bool, "its layers share keys and values"),
    ("scale_attn_by_inverse_layer_idx", bool, "its attention is scaled by the layer's position"),
    ("do_layer_norm_before", lambda value: value is False, "a norm follows the down projection (post-norm OPT)"),
)


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Looks up the family of a Hugging Face config; raises UserError if it is unknown or unsafe to prune."""
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"Model type {model_type!r} is not supported; supported are {known}.")
    for key, is_unsafe, reason in _UNSAFE:
        if key in config and is_unsafe(config[key]):
            raise UserError(f"This {model_type} model cannot be pruned by layers: {reason} ({key}={config[key]}).")
    return ARCHITECTURES[model_type]


def layer_count(config: dict[str, Any]) -> int:
    return int(config[architecture_of(config).layer_count_key])


def prune_config(config: dict[str, Any], removed: Sequence[int]) -> dict[str, Any]:
    """Returns a copy of a config in which every per-layer field has lost the `removed` (original) indices.

    Raises UserError for a list with one entry per layer whose meaning is not known.
    """
    layers = layer_count(config)
    kept = [index for index in range(layers) if index not in set(removed)]
    pruned = dict(config)
    pruned[architecture_of(config).layer_count_key] = len(kept)
    for key, value in config.items():
        if key in _PER_LAYER_KEYS and value is not None:
            pruned[key] = [value[index] for index in kept]
        elif isinstance(value, list) and len(value) == layers and key != "architectures":
            raise UserError(f"Config field {key!r} has one entry per layer and is not known; removal is not safe.")
    if config.get("max_window_layers") is not None:  # Qwen: layers below it use full attention
        pruned["max_window_layers"] = sum(index < config["max_window_layers"] for index in kept)
    return pruned


@contextmanager
def without_layers(model: Any, architecture: Architecture, removed: Sequence[int]) -> Iterator[None]:
    """Runs `model` without the layers at the `removed` indices, and puts them back afterwards.

    The layer list, every module's `layer_idx` (its KV cache slot) and the config's per-layer fields follow.
    """
    parent_path, _, list_name = architecture.layers.rpartition(".")
    parent = model.get_submodule(parent_path)
    original = architecture.layer_list(model)
    original_config = model.config.to_dict()
    pruned_config = prune_config(original_config, removed)
    changed = [key for key, value in pruned_config.items() if value != original_config[key]]
    kept = nn.ModuleList(layer for index, layer in enumerate(original) if index not in set(removed))
    try:
        setattr(parent, list_name, kept)
        _number_layers(kept)
        _set_config(model, {key: pruned_config[key] for key in changed})
        yield
    finally:
        setattr(parent, list_name, original)
        _number_layers(original)
        _set_config(model, {key: original_config[key] for key in changed})


def _set_config(model: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        setattr(model.config, key, value)


def _number_layers(layers: nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
