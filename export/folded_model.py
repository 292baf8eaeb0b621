"""A model in memory that has an artifact's weights: corrections folded in float64, and everything
rounded once.

What is written is folded from the files, tensor by tensor (export.fold). Both share `fold_changes`,
so that a mistake in it would pass their comparison; `require_exact_fold` compares it with the
corrections on hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from export.tolerance import logit_tolerance
from gradmap.common.errors import UserError
from gradmap.model.architectures import Architecture, architecture_of
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.configs import hidden_size, layer_count
from gradmap.model.corrections import Changes, Place
from gradmap.model.folding import fold_parameter
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_model
from gradmap.model.safetensors_reader import StoredTensor, list_tensors
from gradmap.model.sublayers import Pair


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """That of all floating-point tensors of a checkpoint; None if they differ."""
    dtypes = {tensor.spec.dtype for tensor in _floating_tensors(checkpoint)}
    return dtypes.pop() if len(dtypes) == 1 else None


@torch.inference_mode()
def require_exact_fold(
    checkpoint: Checkpoint, removed: Sequence[Pair], changes: Changes, input_ids: Tensor
) -> None:
    """Raises UserError unless the changes compute the same folded as on hooks, as far as float32
    can tell. input_ids: (B, T)."""
    model = load_model(checkpoint, "float32", "cpu")
    layered = LayeredModel.of(model)
    with layered.changed(changes, without=removed):
        unfolded = finite_logits(model, input_ids)
    fold_and_round(model, checkpoint, changes, torch.float32)
    with layered.without(removed):
        folded = finite_logits(model, input_ids)
    difference = ((folded - unfolded).double().norm() / unfolded.double().norm()).item()
    layers = layer_count(checkpoint.config) - len(removed)
    tolerance = logit_tolerance(layers, hidden_size(checkpoint.config), torch.float32)
    if not difference <= tolerance:
        raise UserError(
            "Folded into the weights, the plan's corrections do not compute what they do "
            f"unfolded: logits differ by {difference:.2g} (relative), where rounding explains "
            f"{tolerance:.2g}; nothing was written."
        )


@torch.inference_mode()
def fold_and_round(
    model: Any, checkpoint: Checkpoint, changes: Changes, dtype: torch.dtype | None
) -> None:
    """Gives a model in float32 the weights that its artifact has, rounded to `dtype`.

    dtype: None rounds what is changed to the dtype that the checkpoint stores it in, and nothing
    else. From float64 it is reached directly, since by way of float32 it would be rounding twice.
    Raises UserError for what does not fit.
    """
    architecture = architecture_of(checkpoint.config)
    place_of = _places_by_parameter(model, architecture, changes)
    stored = {} if dtype is not None else _stored_dtypes(checkpoint, changes)
    for name, parameter in model.named_parameters():
        place = place_of.get(id(parameter))
        if place is not None:
            # what the checkpoint lacks is reported when its tensors are listed for writing
            rounded_to = dtype or stored.get((place, parameter.dim() == 1), torch.float32)
            transposed = architecture.transposed_linear
            rounded = partial(_rounded, name, dtype=rounded_to)
            fold_parameter(parameter, changes[place], transposed, rounded)
        elif dtype not in (None, parameter.dtype):
            parameter.copy_(_rounded(name, parameter, dtype))


def finite_logits(model: Any, input_ids: Tensor) -> Tensor:
    """(B, T, V) float32. Raises UserError if one is not finite."""
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    if not logits.isfinite().all():
        raise UserError("The model's logits are not finite; its weights are damaged.")
    return logits


def _places_by_parameter(
    model: Any, architecture: Architecture, changes: Changes
) -> dict[int, Place]:
    """Which changed map a parameter (its id) is the weight or the bias of."""
    layers = architecture.layer_list(model)
    place_of = {}
    for place in changes:
        for parameter in architecture.parts_of(layers[place.layer], place.target):
            place_of[id(parameter)] = place
    return place_of


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = value.to(dtype)
    if (value.isfinite() & ~rounded.isfinite()).any():
        raise UserError(f"{name} does not fit in {dtype}; export with --dtype bfloat16 or float32.")
    return rounded


def _stored_dtypes(
    checkpoint: Checkpoint, changes: Changes
) -> dict[tuple[Place, bool], torch.dtype]:
    """How the weights (False) and biases (True) of the changed maps are stored; of experts, all are
    stored alike."""
    architecture = architecture_of(checkpoint.config)
    dtypes = {}
    for tensor in _floating_tensors(checkpoint):
        parsed = architecture.parse_tensor_name(tensor.spec.name)
        if parsed is None:
            continue
        _, index, suffix = parsed
        for place in changes:
            if place.layer == index and architecture.is_part_of(place.target, suffix):
                dtypes[place, len(tensor.spec.shape) == 1] = tensor.spec.dtype
    return dtypes


def _floating_tensors(checkpoint: Checkpoint) -> list[StoredTensor]:
    tensors = chain.from_iterable(map(list_tensors, checkpoint.weight_files))
    return [tensor for tensor in tensors if tensor.spec.dtype.is_floating_point]
