"""What methods that train corrections share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradmap.common.distributed import sum_gradients
from gradmap.model.batching import Batches

# Of some of a step's samples: what is computed of them, (...), and the gradient of the loss by it,
# likewise; None if it is the loss itself.
OutputOf = Callable[[slice], tuple[Tensor, Tensor | None]]
# Gives the parameters the gradients of a step, of so many samples in this process.
SetGradients = Callable[[Sequence[Tensor], int, OutputOf, Batches], None]


def set_gradients(
    parameters: Sequence[Tensor], samples: int, output_of: OutputOf, batches: Batches
) -> None:
    """Gives the parameters the gradients of a step: the sum over this process's `samples`, as many
    at once as memory allows, and over all processes."""
    for parameter in parameters:
        parameter.grad = None

    def add_gradients(batch: slice) -> None:
        """All of them or, where memory runs out, none. None is of experts that were idle."""
        output, by_output = output_of(batch)
        gradients = torch.autograd.grad(output, parameters, by_output, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    batches.run(samples, add_gradients)
    sum_gradients(parameters)
