"""Quantises a checkpoint with llm-compressor, calibrated on texts: compress.py REQUEST.

REQUEST is a JSON file: checkpoint and out (directories), samples (a safetensors file with
`input_ids` (N, T)), scheme (of compressed-tensors), group_size (how many weights share a scale,
null for the scheme's own), ignore (names of linear maps that stay as they are) and shard_bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

# Samples that pass a layer at once.
BATCH = 8
# Tokens that show which maps read what a norm gives.
SHORT = 8
# How much of the outliers of activations goes to the weights. Of SmolLM2 without 8 layers, the most
# likely token was the unquantised model's at 91.3% of 4096 positions with 0.8, at 90.8% with 0.5,
# and at 88.7% without.
SMOOTHING = 0.8

# A norm, and the linear maps that read what it gives, by their names.
Fed = dict[str, list[str]]


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    samples = load_file(request["samples"])["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype="auto").eval()
    oneshot(
        model=model,
        dataset=as_dataset(samples),
        recipe=modifiers(model, samples, request),
        batch_size=BATCH,
        num_calibration_samples=len(samples),
        max_seq_length=samples.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(
        request["out"], save_compressed=True, max_shard_size=request["shard_bytes"]
    )


def as_dataset(samples: Tensor) -> Dataset:
    """Token ids (N, T), every one of which is looked at."""
    attended = torch.ones_like(samples).tolist()
    return Dataset.from_dict({"input_ids": samples.tolist(), "attention_mask": attended})


def modifiers(model: Any, samples: Tensor, request: dict[str, Any]) -> list[Any]:
    """GPTQ (Frantar et al., 2210.17323), behind SmoothQuant (Xiao et al., 2211.10438) where
    activations are quantised, too."""
    preset = scheme(request)
    gptq = GPTQModifier(config_groups={"group_0": preset}, ignore=request["ignore"])
    fed = {} if preset.input_activations is None else smoothable(model, samples[:1, :SHORT])
    if not fed:
        return [gptq]
    mappings = [[maps, norm] for norm, maps in fed.items()]
    return [SmoothQuantModifier(smoothing_strength=SMOOTHING, mappings=mappings), gptq]


def scheme(request: dict[str, Any]) -> QuantizationScheme:
    """How the linear maps are quantised, and what enters them."""
    preset = preset_name_to_scheme(request["scheme"], ["Linear"])
    if request["group_size"] is not None:
        preset.weights.group_size = request["group_size"]
    return preset


@torch.inference_mode()
def smoothable(model: Any, input_ids: Tensor) -> Fed:
    """The norms whose gains can be divided by anything that the maps behind them are multiplied
    with. input_ids: (1, T).

    Tried with powers of two, which change no digit: unless the logits stay the same, bit for bit,
    something else reads what the norm gives, or its gain is not its weight (Gemma adds 1).
    """
    kinds: defaultdict[str, Fed] = defaultdict(dict)
    for norm, maps in maps_behind_norms(model, input_ids).items():
        kinds[re.sub(r"\d+", "N", norm)][norm] = maps
    fits = [fed for fed in kinds.values() if is_same_when_scaled(model, fed, input_ids)]
    return {norm: maps for fed in fits for norm, maps in fed.items()}


def maps_behind_norms(model: Any, input_ids: Tensor) -> Fed:
    """Which linear maps but the output layer read what a norm gives, as it is."""
    given: dict[int, tuple[str, Tensor]] = {}  # kept, so that no other tensor gets its number
    fed: defaultdict[str, list[str]] = defaultdict(list)

    def note(norm: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        given[id(output)] = (norm, output)

    def look(path: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and id(inputs[0]) in given:
            fed[given[id(inputs[0])][0]].append(path)

    head = model.get_output_embeddings()
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            hooks.append(module.register_forward_pre_hook(partial(look, name)))
        elif is_norm(module):
            hooks.append(module.register_forward_hook(partial(note, name)))
    model(input_ids=input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return fed


def is_norm(module: Any) -> bool:
    """Whether it has a gain for every channel, and nothing below it."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 1 and not list(module.children())


@torch.inference_mode()
def is_same_when_scaled(model: Any, fed: Fed, input_ids: Tensor) -> bool:
    """Whether the logits stay bit for bit what they are, with the gains multiplied by powers of two
    and the maps divided by them."""
    before = model(input_ids=input_ids, use_cache=False).logits
    scale(model, fed, 1)
    after = model(input_ids=input_ids, use_cache=False).logits
    scale(model, fed, -1)
    return torch.equal(before, after)


def scale(model: Any, fed: Fed, sign: int) -> None:
    """Multiplies the gain of every norm by powers of two, and divides the maps by them; -1 undoes
    that."""
    for name, maps in fed.items():
        norm = model.get_submodule(name)
        powers = sign * (torch.arange(len(norm.weight)) % 3 - 1)
        factors = torch.exp2(powers.to(norm.weight.dtype))
        norm.weight.mul_(factors)
        if getattr(norm, "bias", None) is not None:
            norm.bias.mul_(factors)
        for path in maps:
            model.get_submodule(path).weight.div_(factors)


if __name__ == "__main__":
    main()
