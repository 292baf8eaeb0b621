"""Runs in a fresh process, knows nothing of gradmap: `python -m export.reload DIRECTORY PROBE OUT`.

Loads an artifact with stock transformers in float32 and writes its logits for the probe's `input_ids` (B, T):
`logits` (B, T, V) of one full pass, and `cached_logits` (B, V) of the last position, reached through the KV cache.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main(directory: str, probe: str, out: str) -> None:
    input_ids = load_file(probe)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logits = model(input_ids=input_ids, use_cache=False).logits
    prefix = model(input_ids=input_ids[:, :-1], use_cache=True)
    cached = model(input_ids=input_ids[:, -1:], past_key_values=prefix.past_key_values, use_cache=True).logits
    save_file({"logits": logits.contiguous(), "cached_logits": cached[:, -1].contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
