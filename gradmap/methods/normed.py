"""Fits of a linear map that an RMS norm follows (Gemma 2 and 3, OLMo 2 and 3, GLM-4, EXAONE 4).

What is added to the hidden state is g * y / rms(y), with y = W x and g the gain of the norm. Two
steps fit it, each in closed form:

- With every rms(y) held at what it is, what is added is a linear map of x / rms(y). The ridge of
  Eq. 10 finds the change of diag(g) W that gives what is missing.
- The norm takes the size of the new W x away again. So the gain is fitted, channel by channel, to
  what the norm then makes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmap.common.distributed import summed
from gradmap.methods.compensation import Pruned
from gradmap.methods.features import Fit, Walks
from gradmap.model.corrections import Changes, Gain, Place
from gradmap.model.layered import NormPlace
from gradmap.model.precision import widened


def before_gain(cross: Tensor, gain: Tensor) -> Tensor:
    """D F^T (d, f) for a change of W in place of one of diag(g) W: each channel over its gain (d,).
    One whose gain is zero adds nothing, and asks for no change."""
    gain = gain[:, None].to(cross.device)
    return torch.where(gain == 0, 0, cross / gain)


def gain_sums(made: Tensor, to_make: Tensor, target: Tensor | None) -> Tensor:
    """What the factors of a gain follow from, channel by channel: the sums over tokens of what the
    norm makes times what it ought to make, and of the former squared, (2, d) float64.

    made, to_make: (B, T, d). target: likewise; tokens count by 1 / |target|^2 if it is given.
    """
    weighted = made if target is None else made / target.square().sum(dim=-1, keepdim=True)
    return torch.stack(
        [(weighted * other).flatten(end_dim=-2).sum(dim=0).double() for other in (to_make, made)]
    )


def gain_factor(sums: Tensor) -> Tensor:
    """The factors of least squares, (d,); of a channel in which nothing is made, 1."""
    along, squares = sums
    return torch.where(squares > 0, along / squares, 1.0)


def fit_gain(
    pruned: Pruned, fit: Fit, norm: NormPlace, changes: Changes, walks: Walks
) -> tuple[Place, Gain]:
    """The gain with which what the norm makes, with these changes of the map before it, comes
    nearest to what is missing: least squares in each channel by itself.

    walks: as they are once the map was fitted.
    """
    sums: list[Tensor] = []

    def visit_batch(samples: slice, captured: list[tuple[Tensor, Tensor]], output: Tensor) -> None:
        ((_, made),) = captured
        target = widened(walks.dense.hidden[samples].to(output.device))
        made = widened(made).reshape(target.shape)
        to_make = target - widened(output) + made
        sums.append(gain_sums(made, to_make, target if fit.weighted else None).cpu())

    walks.pruned.look(fit.sublayer, [pruned.model.map_at(norm.place)], changes, visit_batch)
    return norm.changed(gain_factor(summed(torch.stack(sums).sum(dim=0))))
