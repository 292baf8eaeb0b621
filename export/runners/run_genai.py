"""Loads an artifact in onnxruntime-genai."""

from __future__ import annotations

import json
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import onnxruntime_genai
import torch
from torch import Tensor

from export.runners.probe_io import decode_greedily, run


def outcome_of(
    directory: Path, input_ids: Tensor, greedy_tokens: int
) -> tuple[dict[str, Tensor], str]:
    """input_ids: (B, T). Logits are (B, T, V), those through the cache (B, V), greedy_ids (G,)."""
    model = onnxruntime_genai.Model(str(directory))
    limit = max(input_ids.shape[1] + greedy_tokens, window_of(directory))

    def append(ids: Tensor, generator: Any) -> tuple[Tensor, Any]:
        if generator is None:
            parameters = onnxruntime_genai.GeneratorParams(model)
            parameters.set_search_options(max_length=limit, do_sample=False)
            generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids.int().numpy())
        return torch.from_numpy(generator.get_output("logits")).float(), generator

    def step(ids: Tensor, generator: Any) -> tuple[Tensor, Any]:
        logits, generator = append(ids, generator)
        return logits[:, -1], generator

    logits, cached = [], []
    for sample in input_ids.split(1):
        logits.append(append(sample, None)[0])
        _, generator = append(sample[:, :-1], None)
        cached.append(step(sample[:, -1:], generator)[0])
    tensors = {
        "logits": torch.cat(logits),
        "cached_logits": torch.cat(cached),
        "greedy_ids": decode_greedily(step, input_ids[:1], greedy_tokens)[0],
    }
    distribution = packages_distributions()["onnxruntime_genai"][0]
    return tensors, f"{distribution} {version(distribution)}, {model.device_type}"


def window_of(directory: Path) -> int:
    """Tokens in the sliding window, or 0: the runtime refuses a cache that holds fewer."""
    decoder = json.loads((directory / "genai_config.json").read_text())["model"]["decoder"]
    return int(decoder.get("sliding_window", {}).get("window_size", 0))


if __name__ == "__main__":
    run(outcome_of)
