"""Llamas of any shape with random weights, for what depends on sizes alone."""

from __future__ import annotations

import torch

from gradmap.model.layered import LayeredModel
from gradmap.model.shape import Shape

HEAD_WIDTH, LEAST_HEADS = 128, 4


def make_random_llama(shape: Shape, dtype: torch.dtype, device: str) -> LayeredModel:
    """A Llama with random weights, made on the device, so that nothing is read or copied. For
    inference: no parameter requires a gradient."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = max(LEAST_HEADS, shape.width // HEAD_WIDTH)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=int(shape.inner),
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=round(heads * shape.kv_share),
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LayeredModel.of(model.eval().requires_grad_(False))
