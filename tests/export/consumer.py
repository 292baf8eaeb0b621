"""Runs in the environment of `make consumers`, where nothing of gradmap is installed.

python consumer.py transformers|optimum OUT ARTIFACT...: loads each artifact as anyone would, and
writes to OUT/NAME.safetensors its logits for `input_ids` of OUT/probe.safetensors and what it
generates greedily after the first.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

NEW_TOKENS = 16


def load(consumer, directory):
    if consumer == "optimum":
        from optimum.onnxruntime import ORTModelForCausalLM

        return ORTModelForCausalLM.from_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)


@torch.inference_mode()
def use(consumer, directory, input_ids):
    model = load(consumer, directory)
    mask = torch.ones_like(input_ids)
    logits = model(input_ids=input_ids, attention_mask=mask).logits
    text = model.generate(
        input_ids[:1],
        attention_mask=mask[:1],
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    assert transformers.AutoTokenizer.from_pretrained(directory).decode(text[0])
    return {"logits": logits.contiguous(), "generated": text[0, input_ids.shape[1] :].contiguous()}


def main(consumer, out, *artifacts):
    assert transformers.__version__.startswith("4.")
    input_ids = load_file(Path(out, "probe.safetensors"))["input_ids"]
    for artifact in map(Path, artifacts):
        save_file(use(consumer, artifact, input_ids), Path(out, f"{artifact.name}.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
