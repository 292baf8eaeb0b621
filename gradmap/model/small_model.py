"""A model of the same kind as another one, small enough to try things on: the same config, with
fewer heads, narrow FFNs, a tiny vocabulary and a few of the layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gradmap.common.console import waiting
from gradmap.common.errors import UserError, first_line
from gradmap.common.failures import explain
from gradmap.common.reading import read_json_object
from gradmap.model.configs import (
    cached_by_config,
    complete_config,
    config_errors_refused,
    layer_count,
    prune_config,
)
from gradmap.model.kinds import kinds_of, layer_lists
from gradmap.model.sublayers import Pair

VOCABULARY = 64
INNER_WIDTH = 24
# One to remove, and one to keep before and behind it.
OF_EACH_KIND = 3
MOST_WEIGHTS = 1 << 27
# What families call their heads, those of keys and values, what is as wide as the hidden state, and
# the widths inside an FFN.
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
_INNER_WIDTHS = (
    "intermediate_size",
    "intermediate_size_mlp",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)
# How many experts a mixture has, and how many of them a token is routed to.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROUTED = ("num_experts_per_tok", "num_experts_per_token", "moe_k")


class NotPrunableError(Exception):
    """Says what was seen of a model that cannot be pruned, as the end of a sentence."""


@contextmanager
def trying_small_model(config: Mapping[str, Any]) -> Iterator[Any]:
    """A small model of the kind that a config describes, with random weights; without gradients,
    and torch's random numbers are left as they were. Raises UserError for what is seen of it,
    whatever it is."""
    try:
        looking = waiting("Looking at how the model is built")
        with looking, torch.no_grad(), _random_numbers_kept():
            model = build_model(_smallest(config))
            randomise(model)
            yield model
    except UserError:
        raise
    except Exception as problem:  # a family's code can raise anything
        if (of_machine := explain(problem)) is not None:
            raise of_machine from None
        seen = problem if isinstance(problem, NotPrunableError) else first_line(problem)
        raise UserError(
            f"This {config['model_type']} model cannot be pruned by layers: {seen} (seen on a "
            "small model of its config)."
        ) from None


@cached_by_config
def _smallest(config: dict[str, Any]) -> dict[str, Any]:
    return few_layers(small_config(config))


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Those that the CPU draws next are the same after the block."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def small_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, with its family's defaults, and everything small that may be so without changing
    what the model is.

    The size of a head stays, for position embeddings are made for it; so heads are divided, and
    the hidden state with them.
    """
    config = complete_config(config)
    small = dict(config)
    divisor = _heads_divisor(config)
    for name in (*_HEADS, *_KV_HEADS, *_WIDTHS):
        value = config.get(name)
        if type(value) is int and value % divisor == 0:
            small[name] = value // divisor
    for name in _INNER_WIDTHS:
        if type(config.get(name)) is int:
            small[name] = min(config[name], INNER_WIDTH)
    for name in _EXPERTS:
        if type(config.get(name)) is int:
            small[name] = min(config[name], _fewest_experts(config))
    small["vocab_size"] = VOCABULARY
    for name in config:
        if name.endswith("token_id") and config[name] is not None:
            small[name] = 0
    return small


def _heads_divisor(config: Mapping[str, Any]) -> int:
    """By what the heads can be divided so that two are left, and as many of each key's and value's
    group."""
    heads = next((config[name] for name in _HEADS if type(config.get(name)) is int), 1)
    kv_heads = next((config[name] for name in _KV_HEADS if type(config.get(name)) is int), heads)
    divisor = gcd(heads, kv_heads) if kv_heads > 1 else heads
    return divisor // 2 if divisor == heads and divisor % 2 == 0 else divisor


def _fewest_experts(config: Mapping[str, Any]) -> int:
    """Enough to choose from: two in each group, and more than a token is routed to."""
    groups = int(config.get("n_group") or 1)
    routed = max(int(config.get(name) or 1) for name in _ROUTED)
    return groups * max(2, routed // groups + 1)


def few_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the first OF_EACH_KIND layers of each kind, in their order."""
    layers, model = layer_count(config), build_model(config, "meta")
    lists = layer_lists(model, layers).values()
    if not lists:
        raise NotPrunableError(f"it has no list of {layers} layers")
    kinds = kinds_of([nn.ModuleList(places) for places in zip(*lists, strict=True)])
    more = [place for place in range(layers) if kinds[:place].count(kinds[place]) >= OF_EACH_KIND]
    few = prune_config(config, [Pair.of_layer(place) for place in more])
    weights = build_model(few, "meta").num_parameters()
    if weights > MOST_WEIGHTS:
        raise NotPrunableError(
            f"it has {weights / 1e6:.0f} million weights where it is as small as can be made, for "
            "it is not known what it calls its sizes"
        )
    return few


def build_model(config: Mapping[str, Any], device: str = "cpu") -> Any:
    """A model of this config in float64, with random weights; without any on the device `meta`.
    Raises UserError if transformers makes none."""
    with config_errors_refused(config), torch.device(device):
        # some families' configs write into what they are given
        parsed = CONFIG_MAPPING[config["model_type"]](**deepcopy(dict(config)))
        # float64 is not to be had from the grouped product that mixtures of experts use otherwise
        model = AutoModelForCausalLM.from_config(
            parsed, dtype=torch.float64, experts_implementation="eager"
        )
    return model.eval().requires_grad_(False)


def small_ids() -> Tensor:
    """Samples for it, (2, 6)."""
    return torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Makes every weight random, biases and the weights of norms too, so that none can be
    overlooked."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.add_(noise, alpha=0.1)


@dataclass(frozen=True)
class Saved:
    """A checkpoint: the contents of config.json, and tensors by name."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def saved(model: Any) -> Saved:
    """What transformers writes of a model."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tensors: dict[str, Tensor] = {}
        for path in Path(directory).glob("*.safetensors"):
            tensors |= load_file(path)
        return Saved(read_json_object(Path(directory, "config.json")), tensors)
