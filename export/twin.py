"""Whether a format says what happens far into a text: where windows close, ropes are scaled and
caches turn over.

The probe of an artifact is short, and these are thousands of tokens away. A twin is a small random
model with the config of the large one, in which they are near: it is exported and run as the large
one will be, past all of them.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gradmap.common.files import write_json
from gradmap.model.checkpoint import Checkpoint, open_checkpoint
from gradmap.model.configs import prune_config
from gradmap.model.model_files import copy_files
from gradmap.model.sublayers import Pair

# Beyond the last boundary; greedy decoding then goes on through the cache.
TOKENS_BEYOND = 32
# A boundary that is farther away is put here.
NEAR = 64
FAR = 512
HEADS = 2
INNER = 128
EXPERTS = 4
# Rope types that the probe may not see: they change at that length, or change what turns slowly.
# (Those of type dynamic follow the length of each text, so that a cache differs from the model by
# itself, in every runtime.)
FAR_ROPES = ("longrope", "yarn", "llama3")
_ROPE_KEYS = ("rope_parameters", "rope_scaling")


def find_boundaries(config: dict[str, Any]) -> dict[str, int]:
    """Tokens from the beginning of a text, by what happens there."""
    parsed = AutoConfig.for_model(**deepcopy(config))
    found = {}
    window = getattr(parsed, "sliding_window", None)
    if window and window < parsed.max_position_embeddings and _slides(parsed):
        found["sliding_window"] = int(window)
    for rope in _ropes(parsed.to_dict()):
        kind = rope.get("rope_type")
        if kind in FAR_ROPES:
            original = (
                rope.get("original_max_position_embeddings") or parsed.max_position_embeddings
            )
            found[f"rope of type {kind}"] = int(original)
    return found


def twin_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a twin: narrow, two layers of each kind, and no boundary beyond FAR tokens."""
    parsed = AutoConfig.for_model(**deepcopy(config))
    head_dim = getattr(parsed, "head_dim", None) or parsed.hidden_size // parsed.num_attention_heads
    few_heads = 1 if parsed.num_key_value_heads < parsed.num_attention_heads else HEADS
    small = prune_config(config, _repeated_layers(parsed))
    small |= {"hidden_size": HEADS * head_dim, "head_dim": head_dim, "intermediate_size": INNER}
    small |= {"num_attention_heads": HEADS, "num_key_value_heads": few_heads}
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if key in small:
            small[key] = INNER
    for key in ("num_experts", "num_local_experts"):
        if key in small:
            small |= {key: EXPERTS, "num_experts_per_tok": min(HEADS, small["num_experts_per_tok"])}
    return _with_near_boundaries(small, parsed.max_position_embeddings)


def write_twin(
    checkpoint: Checkpoint, removed: tuple[Pair, ...], directory: Path, patterns: tuple[str, ...]
) -> Checkpoint:
    """Writes a twin of the pruned model, with seeded random weights. patterns: of the companions
    that it needs."""
    config = twin_config(prune_config(checkpoint.config, removed))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**deepcopy(config)), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # norms stay what they are; products keep the scale of their inputs, so that attention
            # is not uniform
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(directory)
    write_json(directory / "config.json", config)
    copy_files(checkpoint.directory, directory, patterns)
    return open_checkpoint(str(directory))


def probe_beyond(config: dict[str, Any]) -> torch.Tensor:
    """Token ids (2, T) that pass every boundary of the config."""
    tokens = max(find_boundaries(config).values()) + TOKENS_BEYOND
    generator = torch.Generator().manual_seed(0)
    return torch.randint(int(config["vocab_size"]), (2, tokens), generator=generator)


def rope_types(config: dict[str, Any]) -> set[str]:
    """The kinds of rope that a config has, as it is written, in new or old names."""
    parsed = AutoConfig.for_model(**deepcopy(config)).to_dict()
    return {str(rope.get("rope_type", "default")) for rope in _ropes(parsed)}


def _slides(parsed: Any) -> bool:
    kinds = getattr(parsed, "layer_types", None)
    return kinds is None or "sliding_attention" in kinds


def _repeated_layers(parsed: Any) -> list[Pair]:
    """All but the first two layers of each kind."""
    kinds = getattr(parsed, "layer_types", None) or ["any"] * parsed.num_hidden_layers
    repeated = [index for index, kind in enumerate(kinds) if kinds[:index].count(kind) >= 2]
    return [Pair.of_layer(index) for index in repeated]


def _with_near_boundaries(config: dict[str, Any], positions: int) -> dict[str, Any]:
    near = deepcopy(config)
    if (near.get("sliding_window") or 0) > FAR:
        near["sliding_window"] = NEAR
    boundaries = [
        tokens for what, tokens in find_boundaries(config).items() if what.startswith("rope")
    ]
    if boundaries and max(boundaries) > FAR:
        shrinkage = NEAR / max(boundaries)
        for rope in _ropes(near):
            if "original_max_position_embeddings" in rope:
                rope["original_max_position_embeddings"] = NEAR
        if "original_max_position_embeddings" in near:  # Phi-3 has it beside
            near["original_max_position_embeddings"] = NEAR
        near["max_position_embeddings"] = max(NEAR, round(positions * shrinkage))
    return near


def _ropes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a config: one, or one for each kind of layer."""
    found: list[dict[str, Any]] = []
    for key in _ROPE_KEYS:
        rope = config.get(key)
        if isinstance(rope, dict):
            by_kind = [value for value in rope.values() if isinstance(value, dict)]
            found += by_kind or [rope]
    return found
