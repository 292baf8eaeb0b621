"""Quantises a checkpoint with llm-compressor, calibrated on texts: compress.py REQUEST.

REQUEST is a JSON file: checkpoint and out (directories), samples (a safetensors file with
`input_ids` (N, T)), scheme (of compressed-tensors), group_size (how many weights share a scale,
null for the scheme's own), ignore (names of linear maps that stay as they are) and shard_bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# Samples that pass a layer at once.
BATCH = 8


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    samples = load_file(request["samples"])["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype="auto")
    # GPTQ: Frantar et al., 2210.17323
    gptq = GPTQModifier(config_groups={"group_0": scheme(request)}, ignore=request["ignore"])
    oneshot(
        model=model,
        dataset=as_dataset(samples),
        recipe=[gptq],
        batch_size=BATCH,
        num_calibration_samples=len(samples),
        max_seq_length=samples.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(
        request["out"], save_compressed=True, max_shard_size=request["shard_bytes"]
    )


def as_dataset(samples: torch.Tensor) -> Dataset:
    """Token ids (N, T), every one of which is looked at."""
    attended = torch.ones_like(samples).tolist()
    return Dataset.from_dict({"input_ids": samples.tolist(), "attention_mask": attended})


def scheme(request: dict[str, Any]) -> QuantizationScheme:
    """How the linear maps are quantised, and what enters them."""
    preset = preset_name_to_scheme(request["scheme"], ["Linear"])
    if request["group_size"] is not None:
        preset.weights.group_size = request["group_size"]
    return preset


if __name__ == "__main__":
    main()
