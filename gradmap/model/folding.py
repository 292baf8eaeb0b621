"""Changes of a model's weights in memory, for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gradmap.model.corrections import Change, Changes, fold_changes
from gradmap.model.layered import LayeredModel


@torch.no_grad()
def fold_into(model: LayeredModel, changes: Changes) -> None:
    """Makes these changes, each rounded to the dtype that the model has its weight in."""
    architecture, layers = model.architecture, model.layers
    for place, of_place in changes.items():
        for parameter in architecture.parts_of(layers[place.layer], place.target):
            rounded = partial(Tensor.to, dtype=parameter.dtype)
            fold_parameter(parameter, of_place, architecture.transposed_linear, rounded)


def fold_parameter(
    parameter: Tensor,
    changes: Sequence[Change],
    transposed: bool,
    rounded: Callable[[Tensor], Tensor],
) -> None:
    """Changes a weight (d_out, d_in), a bias (d_out,), or stacked experts (E, d_out, d_in): these
    one at a time, for in float64 all together would be large. rounded: given what is float64."""
    parts = parameter.unbind() if parameter.dim() == 3 else (parameter,)
    for part in parts:
        part.copy_(rounded(fold_changes(part, changes, transposed)))
