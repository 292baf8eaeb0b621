"""Several processes, each with the whole model and a share of the samples (`torchrun`, `accelerate
launch`).

What is measured on calibration samples is a sum over samples, so every process takes its share and
the sums are added up; then all decide the same. Without such a launcher there is one process, and
nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from gradmap.common.console import say, waiting
from gradmap.common.errors import UserError
from gradmap.common.processes import local_device, process_count, process_rank


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connects the processes while the block runs."""
    if process_count() == 1:
        yield
        return
    with waiting(f"Waiting for all {process_count()} processes"):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def share_of(input_ids: Tensor) -> tuple[Tensor, int]:
    """This process's samples of (N, T), and the number of the first one. Raises UserError if there
    are too few."""
    count = process_count()
    if len(input_ids) < count:
        raise UserError(
            f"{len(input_ids)} samples cannot be shared by {count} processes; start fewer."
        )
    share = _share(len(input_ids))
    return input_ids[share], share.start


def gathered(share: Tensor, samples: int) -> Tensor:
    """All processes' parts of a tensor over samples, put together.

    share: (n, ...), of this process's `share_of` the samples. Returns (N, ...) in their order.
    """
    whole = share.new_zeros(samples, *share.shape[1:])
    whole[_share(samples)] = share
    return summed(whole)


def share_of_step(tensor: Tensor) -> Tensor:
    """This process's part (n, ...) of one step's samples (N, ...) in training; it may be empty."""
    return tensor[_share(len(tensor))]


def say_if_some_are_idle(step_samples: int) -> None:
    """Says so if processes have nothing to do in training with steps of so many samples."""
    idle = process_count() - step_samples
    if idle > 0:
        say(
            f"A step of training takes {step_samples} samples, so that {idle} of {process_count()} "
            "processes are idle."
        )


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Adds up the gradients of every process; a process without samples has none."""
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in parameters
    ]
    for parameter, total in zip(parameters, _summed_at_once(gradients), strict=True):
        parameter.grad = total


def _summed_at_once(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """`summed` of each, in one message: whoever sends one waits for the slowest process."""
    if process_count() == 1:
        return tensors
    total = summed(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = total.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def summed(value: Tensor) -> Tensor:
    """The sum of every process's `value`, (...), the same in all of them."""
    if process_count() > 1:
        device = (
            torch.device(local_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        )
        total = value.to(device, copy=True)
        dist.all_reduce(total)
        return total.to(value.device)
    return value


def least_of_all(value: int) -> int:
    """The lowest of every process's `value`."""
    if process_count() == 1:
        return value
    values = torch.zeros(process_count(), dtype=torch.int64)
    values[process_rank()] = value
    return int(summed(values).min())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which processes may hold a share each, in the CPU's memory. All have to
    ask."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """What a tensor, which each process has whole, is as one like another: of that, a process may
    hold a share."""
    placed = tensor.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return placed
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def _share(samples: int) -> slice:
    start, end = (
        samples * place // process_count() for place in (process_rank(), process_rank() + 1)
    )
    return slice(start, end)
