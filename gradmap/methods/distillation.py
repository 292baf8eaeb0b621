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

from gradmap.methods.training import set_gradients
from gradmap.model.batching import Batches, logits_parts
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import logits_from, run_layers


@dataclass(frozen=True)
class Lessons:
    """Samples (N, T) to train on, and what the dense model makes of them: the output of its last
    layer, (N, T, d), for its logits would be far larger."""

    input_ids: Tensor
    outputs: Tensor

    def of(self, batch: slice) -> Lessons:
        return Lessons(self.input_ids[batch], self.outputs[batch])

    def on(self, device: torch.device) -> Lessons:
        return Lessons(self.input_ids.to(device), self.outputs.to(device))


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
) -> Tensor:
    """Gives the parameters the gradients of a step of training of the model as it is now, with what
    is trained in it. Returns the divergence, summed over the positions of this process, ().

    lessons: this process's share, which may be empty, of the step's `samples`. recompute: see
    `run_layers`.
    """
    lessons = lessons.on(model.device)
    divergences = [torch.zeros((), device=model.device)]

    def gradients_of(batch: slice) -> Sequence[Tensor | None]:
        """All of them or, where memory runs out, none. None for experts that were idle."""
        hidden, taught = teach(model, lessons.of(batch), samples, recompute)
        gradients = torch.autograd.grad(hidden, parameters, taught.gradients, allow_unused=True)
        divergences.append(taught.divergence)
        return gradients

    set_gradients(parameters, len(lessons.input_ids), gradients_of, batches)
    return torch.stack(divergences).sum()


def teach(
    model: LayeredModel, lessons: Lessons, samples: int, recompute: bool
) -> tuple[Tensor, Taught]:
    """What the last layer gives of these lessons, (B, T, d), and what it is to be changed by for
    the mean over a step of so many samples."""
    hidden = run_layers(model, lessons.input_ids, recompute)
    taught = distillation_gradients(model, hidden, lessons.outputs, lessons.input_ids)
    return hidden, taught._replace(gradients=taught.gradients * (len(hidden) / samples))
