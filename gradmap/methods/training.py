"""What methods that train corrections share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gradmap.common.distributed import sum_gradients
from gradmap.model.batching import Batches

# Of some of a step's samples: the gradient of every parameter, None where it has no part in them.
GradientsOf = Callable[[slice], Sequence[Tensor | None]]


def set_gradients(
    parameters: Sequence[Tensor], samples: int, gradients_of: GradientsOf, batches: Batches
) -> None:
    """Gives the parameters the gradients of a step: the sum over this process's `samples`, as many
    at once as memory allows, and over all processes."""
    for parameter in parameters:
        parameter.grad = None

    def add_gradients(batch: slice) -> None:
        for parameter, gradient in zip(parameters, gradients_of(batch), strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    batches.run(samples, add_gradients)
    sum_gradients(parameters)
