"""How far rounding alone may move the logits of a model."""

from __future__ import annotations

import torch

# Room for the constants. A structural error (a lost layer, a lost W') changed SmolLM2's logits by
# 0.3 to 1.0.
SAFETY_FACTOR = 3.0
# Two linear maps in a row on each of a layer's two updates; and the tensors that each update rounds
# on its way.
LINEAR_MAPS_PER_LAYER = 4
ROUNDED_TENSORS_PER_LAYER = 12
# Two logits that err by sigma each may swap places if their distance is below a few times sqrt(2)
# sigma.
SWAP_FACTOR = 6.0
# Some hidden states are thousands of times larger than others, until a later layer cancels them
# (massive activations, Sun et al. 2024, arXiv 2402.17762). Eight bits of such a state can leave
# nothing of what remains, so that a position comes out anyhow: weights rounded to bfloat16 moved
# one of 256 of SmolLM2's by 1.4, and the median by 0.004. A lost layer or correction moves far more
# than a few positions.
STRAY_SHARE = 0.05


def logit_tolerance(
    layers: int, hidden_size: int, compute: torch.dtype, stored: torch.dtype = torch.float32
) -> float:
    """Largest relative root-mean-square difference of logits that rounding can explain.

    A float32 dot product of d terms errs by about sqrt(d) u_32. Rounding a tensor to a coarser
    dtype errs by at most u, uniformly, so by u / sqrt(3) on average: the activations if the runtime
    computes in one (`compute`), and the weights if they were rounded to one (`stored`) on one side
    of the comparison only. Each such error reaches the logits, and independent errors add up by the
    square root of their number.
    """
    maps = LINEAR_MAPS_PER_LAYER * layers
    arithmetic = maps * hidden_size * _unit_roundoff(torch.float32) ** 2
    activations = ROUNDED_TENSORS_PER_LAYER * layers * _unit_roundoff(compute) ** 2 / 3
    weights = maps * _unit_roundoff(stored) ** 2 / 3
    return float(SAFETY_FACTOR * (arithmetic + activations + weights) ** 0.5)


def share_of_strays(compute: torch.dtype, stored: torch.dtype = torch.float32) -> float:
    """Which share of the positions rounding may move by anything; the dtypes are those of
    `logit_tolerance`."""
    coarsest = max(_unit_roundoff(compute), _unit_roundoff(stored))
    return STRAY_SHARE if coarsest > _unit_roundoff(torch.float32) else 0.0


def _unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2
