"""Loads a checkpoint, or a GGUF file, with stock transformers, in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor

from export import GGUF_FILE
from export.runners.probe_io import decode_greedily, placement_for, run, transformers_step


@torch.inference_mode()
def outcome_of(
    directory: Path, input_ids: Tensor, greedy_tokens: int
) -> tuple[dict[str, Tensor], str]:
    """input_ids: (B, T). Logits are (B, T, V), those through the cache (B, V), greedy_ids (G,)."""
    is_gguf = (directory / GGUF_FILE).exists()
    options = {"gguf_file": GGUF_FILE} if is_gguf else placement_for(directory)
    # of a GGUF file transformers would guess it: which layers have a window, of a Gemma
    config = transformers.AutoConfig.from_pretrained(directory)
    loader = transformers.AutoModelForCausalLM
    model = loader.from_pretrained(directory, config=config, dtype=torch.float32, **options).eval()
    step = transformers_step(model)
    _, cache = step(input_ids[:, :-1], None)
    tensors = {
        "logits": model(input_ids=input_ids, use_cache=False).logits,
        "cached_logits": step(input_ids[:, -1:], cache)[0],
        "greedy_ids": decode_greedily(step, input_ids[:1], greedy_tokens)[0],
    }
    return tensors, f"transformers {transformers.__version__}, float32, CPU"


if __name__ == "__main__":
    run(outcome_of)
