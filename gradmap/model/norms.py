"""RMS norms that follow a linear map, as in Gemma 2 and 3: what the map adds passes the norm first.

Gain * y / rms(y), of y = W x: how large y is does not matter, only its direction does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmap.model.layer_runs import FLOAT32, Call, LayerRun, is_same

# How large what enters a norm is when it is tried: no epsilon counts beside it.
LARGE = 1e3


@dataclass(frozen=True)
class Norm:
    """path: inside a layer. offset: what it adds to its weight to make its gain (1 in Gemma)."""

    path: str
    offset: float


def norm_behind(run: LayerRun, calls: Sequence[Call], made: Tensor) -> Norm | None:
    """The RMS norm that reads what a linear map made, if there is one."""
    for call in calls:
        if is_same(call.given, made):
            offset = gain_offset(run.layer.get_submodule(call.path), made.shape[-1])
            if offset is not None:
                return Norm(call.path, offset)
    return None


def gain_offset(module: nn.Module, width: int) -> float | None:
    """What is added to the weight of an RMS norm of so many channels to make its gain; None if the
    module is no such norm."""
    weights = dict(module.named_parameters())
    if list(weights) != ["weight"] or weights["weight"].shape != (width,):
        return None
    generator = torch.Generator().manual_seed(0)
    states = LARGE * torch.randn(8, width, generator=generator, dtype=weights["weight"].dtype)
    made = module(states)
    for offset in (0.0, 1.0):
        if is_same(made, (offset + weights["weight"]) * normalised(states), FLOAT32):
            return offset
    return None


def normalised(states: Tensor) -> Tensor:
    """Each vector over its root mean square: (..., d) -> (..., d)."""
    return states / root_mean_square(states)


def root_mean_square(states: Tensor) -> Tensor:
    """(..., d) -> (..., 1)."""
    return states.square().mean(dim=-1, keepdim=True).sqrt()
