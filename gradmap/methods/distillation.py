"""Training to predict what the dense model does: what a student is given, and one step of it.

The loss is the divergence of the student's next-token distributions from the dense model's, at
every position (Hinton et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradmap.methods.training import SetGradients, set_gradients
from gradmap.model.batching import Batches, logits_parts
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import logits_from, run_layers


@dataclass(frozen=True)
class Lessons:
    """Samples (N, T) to train on, and what the dense model makes of them: the output of its last
    layer, (N, T, d), for its logits would be far larger."""

    input_ids: Tensor
    outputs: Tensor


class Taught(NamedTuple):
    """gradients: dL/d hidden, (B, T, d), where L is the mean of KL(dense || model) over positions,
    nats per token. divergence: L times the number of positions, (), float32 or wider."""

    gradients: Tensor
    divergence: Tensor


def distillation_gradients(
    model: LayeredModel, hidden: Tensor, goal: Tensor, input_ids: Tensor
) -> Taught:
    """What the last layer's output `hidden` (B, T, d) is to be changed by, so that it predicts what
    `goal` (B, T, d) does; input_ids: (B, T). Some positions at a time: logits are the largest
    tensor."""
    gradients = torch.empty_like(hidden)
    divergences: list[Tensor] = []
    samples, tokens = input_ids.shape
    for part in logits_parts(samples, tokens, model.config.vocab_size, hidden.device):
        leaf = hidden[part].detach().requires_grad_(True)
        with torch.no_grad():
            dense = logits_from(model, goal[part], input_ids[part]).flatten(end_dim=1).float()
            wanted = dense.softmax(dim=-1)
            negative_entropy = (wanted * dense).sum() - dense.logsumexp(dim=-1).sum()
        logits = logits_from(model, leaf, input_ids[part]).flatten(end_dim=1).float()
        loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
        (gradients[part],) = torch.autograd.grad(loss / (samples * tokens), leaf)
        divergences.append(loss.detach() + negative_entropy)
    return Taught(gradients, torch.stack(divergences).sum())


def set_lesson_gradients(
    model: LayeredModel,
    lessons: Lessons,
    samples: int,
    parameters: Sequence[Tensor],
    batches: Batches,
    recompute: bool = False,
    set_them: SetGradients = set_gradients,
) -> Tensor:
    """Gives the parameters the gradients of a step of training of the model as it is now, with what
    is trained in it. Returns the divergence, summed over the positions of this process, ().

    lessons: this process's share, which may be empty, of the step's `samples`. recompute: see
    `run_layers`. set_them: another way, where processes share the parameters.
    """
    device = model.device
    ids, goal = lessons.input_ids.to(device), lessons.outputs.to(device)
    # By the first sample of a batch: one that memory ran out for begins again.
    divergences: dict[int, Tensor] = {}

    def output_of(batch: slice) -> tuple[Tensor, Tensor]:
        hidden = run_layers(model, ids[batch], recompute)
        taught = distillation_gradients(model, hidden, goal[batch], ids[batch])
        divergences[batch.start] = taught.divergence
        return hidden, taught.gradients * (len(hidden) / samples)

    set_them(parameters, len(ids), output_of, batches)
    return torch.stack([torch.zeros((), device=device), *divergences.values()]).sum()
