"""What a model computes in: the dtype of its weights, and of its products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from gradmap.common.console import say
from gradmap.common.errors import UserError
from gradmap.common.machine import WORTHWHILE, bfloat16_pays, measure_cpu, warn_if_threads_hinder

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Matrix products in bfloat16, everything else (residual stream, norms, loss) in float32.
AUTOCAST = "autocast"
_FLOAT32_ATTENTION = "sdpa_in_float32"


def fastest_dtype(stored: str, device: str) -> str:
    """What `auto` means for weights that are `stored` so.

    Products in bfloat16 only where the hardware has them: a CPU that emulates them takes several
    times as long. On a CPU all but the products stays in float32; a GPU's memory is dearer, and it
    computes in what is stored.
    """
    if device.startswith("cpu"):
        return AUTOCAST if bfloat16_pays(device) else "float32"
    if stored == "float16":
        return stored
    if not bfloat16_pays(device):
        return "float32"
    return "bfloat16" if stored == "bfloat16" else AUTOCAST


@cache  # one command loads its model more than once
def announce(dtype: str, device: str) -> None:
    """Says once what is computed in, and why."""
    reason = (
        measure_cpu().describe() if device.startswith("cpu") else f"{torch.cuda.get_device_name()}"
    )
    say(f"Computing in {dtype} (found: {reason})")
    if device.startswith("cpu"):
        warn_if_threads_hinder()


@cache
def warn_if_slow(dtype: str, device: str) -> None:
    """Says once that float32 would be faster, if it is."""
    product = "bfloat16" if dtype == AUTOCAST else dtype
    if not device.startswith("cpu") or product not in measure_cpu().by_dtype:
        return
    ratio = measure_cpu().ratio(product)
    if ratio < 1 / WORTHWHILE:
        say(
            f"Warning: --dtype {dtype} computes {1 / ratio:.1f} times as slowly as float32 on this "
            f"machine ({measure_cpu().describe()}); --dtype auto takes the faster one"
        )


def weights_dtype(name: str) -> torch.dtype:
    """The dtype that a model is loaded in. Raises UserError for an unknown name."""
    if name not in (*DTYPES, AUTOCAST):
        raise UserError(f"Unknown dtype {name!r}; use auto, {', '.join(DTYPES)} or {AUTOCAST}.")
    return torch.float32 if name == AUTOCAST else DTYPES[name]


@contextmanager
def computing_in(name: str, model: Any) -> Iterator[None]:
    """Runs `model`, loaded for `name`, with products in bfloat16 if that is `autocast`."""
    if name != AUTOCAST:
        yield
        return
    with torch.autocast(model.device.type, torch.bfloat16):
        yield


def prepare_for_autocast(model: Any) -> None:
    """Casts once, to bfloat16, what autocast would cast again and again: weights, and inputs of
    several linear maps.

    torch's fused attention is three times slower in bfloat16 than in float32 on a CPU, so that it
    stays in float32.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # a tied head parts from its embedding
            if parameter.dim() >= 2 and not isinstance(module, nn.Embedding):
                setattr(module, name, nn.Parameter(parameter.bfloat16(), requires_grad=False))
    cast_once = _CastOnce()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(cast_once)
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_FLOAT32_ATTENTION, _attend_in_float32)
        AttentionMaskInterface.register(_FLOAT32_ATTENTION, sdpa_mask)
        model.set_attn_implementation(_FLOAT32_ATTENTION)


def count_parameters(model: Any) -> int:
    """Parameters as they are stored: a head that has parted from its embedding here (see
    `prepare_for_autocast`) counts once."""
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    if getattr(model.config, "tie_word_embeddings", False):
        parameters.pop(id(model.get_output_embeddings().weight), None)
        embedding = model.get_input_embeddings().weight
        parameters[id(embedding)] = embedding.numel()
    return sum(parameters.values())


class _CastOnce:
    """Casts the input of linear maps to bfloat16, once for those that share it (query, key, value;
    gate, up)."""

    def __init__(self) -> None:
        self._input = self._cast = torch.empty(0)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if args[0] is not self._input:
            self._input, self._cast = args[0], args[0].bfloat16()
        return (self._cast, *args[1:])


def _attend_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    with torch.autocast("cpu", enabled=False):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), *args, **kwargs
        )
    return result


def widened(tensor: Tensor) -> Tensor:
    """The tensor (...) in float32 at least: for sums of many numbers, losses, and differences that
    are far smaller than what they are differences of."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
