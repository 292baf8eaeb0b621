"""How runners read their probe and write their outcome, and the greedy decoding they share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

# Above this share of the free memory, a model's weights stay on disk and are read layer by layer.
MEMORY_SHARE = 0.6

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


def run(outcome_of: Callable[[Path, Tensor, int], tuple[dict[str, Tensor], str]]) -> None:
    """The main program of a runner. outcome_of(directory, input_ids, greedy_tokens) -> (tensors,
    runtime's name)."""
    directory, probe_path, out = map(Path, sys.argv[1:])
    probe = load_file(probe_path)
    tensors, runtime = outcome_of(directory, probe["input_ids"], int(probe["greedy_tokens"]))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        out,
        metadata={"runtime": runtime},
    )


def decode_greedily(step: Step, prompt_ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Continues a prompt (1, T) through the KV cache; end-of-text tokens do not stop it.

    step(ids (1, n), state or None) -> logits of the last position (1, V), state. Returns the tokens
    (G,) and, for each, the margin (G,) by which its logit led the second best.
    """
    ids, margins, state = [], [], None
    feed = prompt_ids
    for _ in range(tokens):
        logits, state = step(feed, state)
        best = logits.float().topk(2)
        feed = best.indices[:, :1]
        ids.append(feed[0])
        margins.append(best.values[0, :1] - best.values[0, 1:])
    empty = torch.zeros(0)
    return torch.cat([empty.long(), *ids]), torch.cat([empty, *margins])


def transformers_step(model: Any) -> Step:
    """A step of a model of transformers, whose state is its cache."""

    def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        return output.logits[:, -1], output.past_key_values

    return step


def placement_for(directory: Path) -> dict[str, Any]:
    """Arguments for `from_pretrained` that keep a model in float32 within memory: {} if it fits as
    it is."""
    parameters = sum(count_stored_values(path) for path in directory.glob("*.safetensors"))
    budget = int(psutil.virtual_memory().available * MEMORY_SHARE)
    return {} if 4 * parameters <= budget else {"device_map": "auto", "max_memory": {"cpu": budget}}


def count_stored_values(path: Path) -> int:
    """How many numbers a safetensors file holds."""
    with safe_open(path, framework="pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not iterable
