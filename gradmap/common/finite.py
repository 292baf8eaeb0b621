"""What is no number is refused where it is seen first, by name: NaN and infinity spread to all that
follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gradmap.common.errors import UserError

CURE = "the checkpoint is damaged, or its dtype overflows (try --dtype float32)"


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape holds neither NaN nor infinity."""
    # Its ends are NaN if any of it is; isfinite of all would make three tensors of that size.
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def require_finite(what: str, *values: Tensor | float | None) -> None:
    """Raises UserError, which says of `what`, if one of the values is not finite; None is none."""
    if not all(_all_finite(value) for value in values if value is not None):
        raise UserError(f"{what} is not finite; {CURE}.")


def _all_finite(value: Tensor | float) -> bool:
    return is_finite(value) if isinstance(value, Tensor) else math.isfinite(value)


def require_finite_weights(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UserError for the first weight that is not finite. weights: name and tensor; those
    that are not in memory (on `meta`) are left out."""
    for name, weight in weights:
        if not weight.is_meta:
            require_finite(f"The weight {name}", weight)


def require_finite_scores(scores: Mapping[str, float]) -> None:
    """Raises UserError for the first score that is not finite. scores: by what they are of."""
    for what, score in scores.items():
        require_finite(f"The score of {what}", score)


def require_finite_losses(losses: Tensor, samples: Sequence[int]) -> None:
    """Raises UserError if the loss of one of these calibration samples (B,) is not finite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        require_finite(f"The loss of calibration sample {samples[int(bad[0])]}", losses[bad[0]])
