"""Whether what a GGUF file says of its model arrived in the model that transformers made of it.

transformers takes the keys and tensors that it knows and passes over all others. One that it passes
over may change what the model computes: a scaled rope, a factor on the logits, a window, a second
file with half of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradmap.common.errors import UserError

# Where a config of transformers keeps what llama.cpp calls so, below the architecture's name.
CONFIG_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
# What changes nothing if it is this.
NEUTRAL = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.finetuned": False,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "use_parallel_residual": False,
}
FLOAT32_RELATIVE = 2**-23  # files keep numbers in float32


def require_whole_file(metadata: Mapping[str, Any], source: Path) -> None:
    """Raises UserError if the file is one of several parts: transformers reads one."""
    parts = int(metadata.get("split.count") or 1)
    if parts > 1:
        raise UserError(
            f"{source} is one of {parts} parts of a model; join them first: llama-gguf-split "
            f"--merge {source.name} WHOLE.gguf."
        )


def require_understood(metadata: Mapping[str, Any], config: Any, source: Path) -> None:
    """Raises UserError if a key of the file's architecture says something else than the model's
    config, or is unknown.

    metadata: key -> value. config: of the model that transformers made (a PretrainedConfig).
    """
    architecture = str(metadata["general.architecture"])
    for key, value in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name != key and not _is_kept(name, value, config):
            raise UserError(
                f"{source} says {key} = {value}, which transformers does not take over into the "
                "model, so that it would compute something else; use the original checkpoint of "
                "this model."
            )


def require_read(names: Iterable[str], read: Iterable[str], source: Path) -> None:
    """Raises UserError if the file has tensors that are not among those that are read."""
    unread = sorted(set(names) - set(read))
    if unread:
        raise UserError(
            f"{source} holds {len(unread)} tensor(s) that transformers does not read, {unread[0]} "
            "first, so that the model would compute something else; use the original checkpoint "
            "of this model."
        )


def _is_kept(name: str, value: Any, config: Any) -> bool:
    if name in NEUTRAL and value == NEUTRAL[name]:
        return True
    field = CONFIG_FIELDS.get(name)
    return field is not None and _same(value, _field_of(config, field))


def _field_of(config: Any, field: str) -> Any:
    if field == "rope_theta":
        rope = config.rope_parameters
        # Gemma 3 has one for each kind of layer
        return rope.get("full_attention", rope)["rope_theta"]
    if field == "head_dim":
        return getattr(config, field, None) or config.hidden_size // config.num_attention_heads
    return getattr(config, field, None)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, int | float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=FLOAT32_RELATIVE)
    return bool(value == other)
