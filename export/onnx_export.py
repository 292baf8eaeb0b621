"""Writes a checkpoint as ONNX: `python -m export.onnx_export CHECKPOINT_DIRECTORY OUT_DIRECTORY
METADATA [int8|int4]`.

A program of its own, so that its memory (several times the model) is given back, and a crash harms
nobody. The graph is traced with torch's exporter at opset 23, which has attention's parts (rotary
embedding, RMS norm) as operators of the standard. Inputs and outputs are named and laid out as
optimum does it, so that whatever reads optimum's exports reads this: input_ids, attention_mask,
position_ids, past_key_values.N.key/.value -> logits, present.N.key/.value. METADATA is a JSON
object of texts for the model's metadata_props.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from gradmap.runtimes.onnx_session import ONNX_FILE

OPSET = 23
EXTERNAL_DATA_FILE = "model.onnx_data"
# A protobuf message ends at 2 GiB; weights beyond this go to a file beside it.
EXTERNAL_DATA_FROM_BYTES = 1_500_000_000
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
# By what --quantise calls them.
BITS = {"int8": 8, "int4": 4}
BLOCK_SIZE = 32
INTEGER_PRODUCTS = 4  # MatMulNBits' accuracy_level


class _CausalLMWithCache(nn.Module):
    """The model as a function of plain tensors: the cache goes in and comes out as pairs of keys
    and values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """input_ids, position_ids: (B, T). attention_mask: (B, P + T). past: keys and values of P
        cached tokens, (B, heads, P, head size), for each layer. Returns logits (B, T, V), and the
        longer past."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return output.logits, present


@torch.inference_mode()
def export_onnx(checkpoint: Path, out: Path, untie: bool = False) -> None:
    """Writes OUT/model.onnx (with model.onnx_data beside it if large) in the checkpoint's dtype.

    untie: give the output layer weights of its own where it shares the embedding's, so that they
    can be quantised.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa")
    model = model.eval().requires_grad_(False)
    _replace_transposed_linear(model)
    if untie:
        output_layer = model.get_output_embeddings()
        output_layer.weight = nn.Parameter(output_layer.weight.clone(), requires_grad=False)
    program = torch.onnx.export(
        _CausalLMWithCache(model),
        _example_inputs(model),
        input_names=[*TOKEN_INPUTS, *_cache_names(model, "past_key_values")],
        output_names=["logits", *_cache_names(model, "present")],
        dynamic_shapes=_dynamic_shapes(model),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    program.save(out / ONNX_FILE, external_data=weight_bytes > EXTERNAL_DATA_FROM_BYTES)


def quantise_weights(directory: Path, bits: int) -> None:
    """Replaces the matrix products' weights by integers of 8 or 4 bits in blocks with a scale each;
    those of the output layer have 8, since an error there reaches every logit.

    Products are computed in integers: activations are rounded to 8 bits on the way, in the same
    blocks. In floating point the graph would be slower than the float32 one.
    """
    model = onnx.load(directory / ONNX_FILE)
    head = [node.name for node in model.graph.node if node.op_type == "MatMul"][-1]
    quantised = _quantised(_quantised(model, bits, but=[head]).model, 8)
    for path in (directory / ONNX_FILE, directory / EXTERNAL_DATA_FILE):
        path.unlink(missing_ok=True)
    quantised.save_model_to_file(str(directory / ONNX_FILE), _needs_external_data(quantised.model))


def _quantised(model: onnx.ModelProto, bits: int, but: Sequence[str] = ()) -> Any:
    """ONNX Runtime's model (ONNXModel) with its matrix products in MatMulNBits; but: those left
    alone, by their names."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=BLOCK_SIZE,
        is_symmetric=True,
        accuracy_level=INTEGER_PRODUCTS,
        nodes_to_exclude=list(but),
    )
    quantizer.process()
    return quantizer.model


def add_metadata(path: Path, metadata: dict[str, str]) -> None:
    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def _replace_transposed_linear(model: nn.Module) -> None:
    """GPT-2's Conv1D would become a Gemm, which the weight quantiser leaves alone; a Linear becomes
    a MatMul."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                setattr(parent, name, _as_linear(child))


def _as_linear(module: Conv1D) -> nn.Linear:
    d_in, d_out = module.weight.shape
    linear = nn.Linear(d_in, d_out)
    linear.weight = nn.Parameter(module.weight.mT.contiguous())
    linear.bias = module.bias
    return linear.requires_grad_(False)


def _example_inputs(model: Any) -> tuple[Any, ...]:
    """Two samples of three new tokens after five cached ones: sizes that cannot be mistaken for one
    another."""
    batch, new, past = 2, 3, 5
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )

    def cache() -> Tensor:  # a tensor each: the exporter takes equal objects for one input
        return torch.zeros(batch, heads, past, head_size, dtype=model.dtype)

    return (
        torch.ones(batch, new, dtype=torch.int64),
        torch.ones(batch, past + new, dtype=torch.int64),
        torch.arange(past, past + new).expand(batch, new),
        [(cache(), cache()) for _ in range(config.num_hidden_layers)],
    )


def _dynamic_shapes(model: Any) -> tuple[Any, ...]:
    tokens = {0: "batch_size", 1: "sequence_length"}
    cache = {0: "batch_size", 2: "past_sequence_length"}
    return (
        tokens,
        {0: "batch_size", 1: "total_sequence_length"},
        tokens,
        [(cache, cache) for _ in range(model.config.num_hidden_layers)],
    )


def _cache_names(model: Any, prefix: str) -> list[str]:
    names = []
    for layer in range(model.config.num_hidden_layers):
        names += [f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"]
    return names


def _needs_external_data(model: onnx.ModelProto) -> bool:
    weight_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    return weight_bytes > EXTERNAL_DATA_FROM_BYTES


def main(checkpoint: str, out: str, metadata: str, *quantise: str) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    export_onnx(Path(checkpoint), Path(out), untie=bool(quantise))
    if quantise:
        quantise_weights(Path(out), BITS[quantise[0]])
    add_metadata(Path(out, ONNX_FILE), json.loads(metadata))
    onnx.checker.check_model(Path(out, ONNX_FILE), full_check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
