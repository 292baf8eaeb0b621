"""What a config says of a model's layers, and what it must say of fewer: every field that is about
single layers follows the sublayer that it describes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache, wraps
from typing import Any, TypeVar

from transformers import CONFIG_MAPPING

from gradmap.common.errors import UserError, first_line
from gradmap.model.sublayers import Pair, Part, joined_layers

# Config keys that hold one entry per layer, and which sublayer it describes; every other list of
# that length is refused as unknown.
_PER_LAYER_KEYS = {
    "layer_types": Part.ATTENTION,
    "no_rope_layers": Part.ATTENTION,
    "layer_rope_theta": Part.ATTENTION,
    "mlp_layer_types": Part.FFN,
}
# Config keys that hold how many of the first layers are otherwise: Qwen's have full attention, and
# those of mixtures no experts.
_COUNTS_OF_FIRST = {
    "max_window_layers": Part.ATTENTION,
    "first_k_dense_replace": Part.FFN,
    "num_dense_layers": Part.FFN,
}
# Config keys that hold the numbers of some layers: Llama 4's, of those with experts.
_LISTS_OF_LAYERS = {"moe_layers": Part.FFN}
# Lists that may happen to be as long as the model is deep.
_OTHER_LISTS = ("architectures", "mlp_only_layers", "eos_token_id", *_LISTS_OF_LAYERS)

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


# What a config says of the files it lies beside, or of how it runs, and not of the model.
_NOT_OF_THE_MODEL = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
)

Result = TypeVar("Result")
ConfigFunction = Callable[[Mapping[str, Any]], Result]


@contextmanager
def config_errors_refused(config: Mapping[str, Any]) -> Iterator[None]:
    """Raises UserError if transformers does not take the config, whatever it raises: it can be any
    error."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"This config.json describes no {config['model_type']} model: {first_line(error)}"
        ) from None


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the family's defaults. Raises UserError if transformers does not take it."""
    own = deepcopy(dict(config))  # some families write into what they are given
    with config_errors_refused(config):
        completed: dict[str, Any] = CONFIG_MAPPING[config["model_type"]](**own).to_dict()
    return completed


def cached_by_config(compute: Callable[[dict[str, Any]], Result]) -> ConfigFunction[Result]:
    """Computes once for what a config says of the model, with its family's defaults: the file on
    disk and the config of the model that was loaded say the same."""

    @lru_cache(maxsize=64)  # a cache takes nothing that can change
    def of_json(config: str) -> Result:
        return compute(json.loads(config))

    @wraps(compute)
    def of_config(config: Mapping[str, Any]) -> Result:
        completed = complete_config(config)
        own = {key: value for key, value in completed.items() if key not in _NOT_OF_THE_MODEL}
        return of_json(json.dumps(own, sort_keys=True, default=str))

    return of_config


def layer_count_key(config: Mapping[str, Any]) -> str:
    """What the family calls the number of its layers. Raises UserError if transformers does not
    know the family."""
    return _own_name(config, "num_hidden_layers")


def hidden_size(config: Mapping[str, Any]) -> int:
    """The width of the hidden state."""
    return int(complete_config(config)[_own_name(config, "hidden_size")])


def _own_name(config: Mapping[str, Any], name: str) -> str:
    """What the family calls what most call so."""
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"Model type {model_type!r} is not one that transformers knows.")
    return str(CONFIG_MAPPING[model_type].attribute_map.get(name, name))


def require_safe(config: Mapping[str, Any]) -> None:
    """Raises UserError if a layer of it is not the same in another place."""
    for key, is_unsafe, reason in _UNSAFE:
        if key in config and is_unsafe(config[key]):
            raise UserError(
                f"This {config['model_type']} model cannot be pruned by layers: {reason} "
                f"({key}={config[key]})."
            )


def layer_count(config: Mapping[str, Any]) -> int:
    return int(config[layer_count_key(config)])


def prune_config(config: Mapping[str, Any], removed: Sequence[Pair]) -> dict[str, Any]:
    """Returns a copy of a config that describes what is left: every per-layer field follows the
    sublayer that it is about.

    Patterns that follow from a layer's position (every other one slides, every second one is
    sparse) are spelled out. Raises UserError for a list with one entry per layer whose meaning is
    not known, or a layer that is not the same in another place.
    """
    require_safe(config)
    layers = layer_count(config)
    kept = joined_layers(layers, removed)
    pruned = deepcopy(dict(config))
    pruned[layer_count_key(config)] = len(kept)
    for key, value in {**config, **_explicit_layer_types(config)}.items():
        if key in _PER_LAYER_KEYS and value is not None:
            pruned[key] = [value[layer[_PER_LAYER_KEYS[key]]] for layer in kept]
        elif isinstance(value, list) and len(value) == layers and key not in _OTHER_LISTS:
            raise UserError(
                f"Config field {key!r} has one entry per layer and is not known; removal is not "
                "safe."
            )
    for key, part in _COUNTS_OF_FIRST.items():
        if config.get(key) is not None:
            pruned[key] = sum(layer[part] < config[key] for layer in kept)
    for key, part in _LISTS_OF_LAYERS.items():
        if config.get(key) is not None:
            pruned[key] = [place for place, layer in enumerate(kept) if layer[part] in config[key]]
    # Qwen-MoE: every n-th layer has experts, but for those listed
    if "decoder_sparse_step" in config:
        step, dense = config["decoder_sparse_step"], config.get("mlp_only_layers") or []
        sparse = [layer.ffn not in dense and (layer.ffn + 1) % step == 0 for layer in kept]
        pruned["decoder_sparse_step"] = 1
        pruned["mlp_only_layers"] = [
            position for position, is_sparse in enumerate(sparse) if not is_sparse
        ]
    return pruned


def _explicit_layer_types(config: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of attention of every layer, where transformers derives it from the layer's
    position."""
    if config.get("layer_types") is not None:
        return {}
    layer_types = complete_config(config).get("layer_types")
    return {} if layer_types is None else {"layer_types": layer_types}
