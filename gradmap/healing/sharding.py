"""Weights that several processes share: each holds a part of every one, and has all of a layer's
together while that runs (FSDP2, torch.distributed.fsdp.fully_shard).

What is trained at full rank is shared in the same way, with its gradients and the optimizer's state
(ZeRO, Rajbhandari et al. 2019, arXiv 1910.02054). All processes do the same things in the same
order, so that they need equally many samples, and memory may run out in none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.pytorch_utils import Conv1D

from gradmap.common.errors import UserError
from gradmap.common.processes import process_count
from gradmap.methods.training import OutputOf
from gradmap.model.batching import Batches
from gradmap.model.layered import LayeredModel


class FixedBatches(Batches):
    """Batches whose size is that of all processes, and stays."""

    def _halve(self) -> None:
        raise UserError(
            f"Memory ran out with {self.size} samples at once; give fewer --tokens, or start more "
            "processes."
        )


def share_weights(model: LayeredModel, device: torch.device) -> None:
    """Leaves this process its part of the layers' weights, on its device; embeddings and head are
    on it whole."""
    mesh = init_device_mesh(device.type, (process_count(),))
    for layer in model.layers:
        for child in layer.children():
            if _has_linear_maps(child):
                sharded = fully_shard(child, mesh=mesh, reshard_after_forward=True)
                # Gradients are of the mean over a step already; other sums than plain ones are
                # unknown to gloo.
                sharded.set_gradient_divide_factor(1.0)
                sharded.set_force_sum_reduction_for_comms(True)
    model.network.to(device)


def _has_linear_maps(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear | Conv1D) for part in module.modules())


def set_shared_gradients(
    parameters: Sequence[Tensor], samples: int, output_of: OutputOf, batches: Batches
) -> None:
    """As `set_gradients`, where the parameters are shared: their gradients are added up in the
    backward pass."""
    for parameter in parameters:
        parameter.grad = None

    def add_gradients(batch: slice) -> None:
        output, by_output = output_of(batch)
        output.backward(by_output)

    batches.run(samples, add_gradients)
