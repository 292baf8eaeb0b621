"""Scores of the weights themselves, as in Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmap.common.distributed import share_of, summed
from gradmap.common.errors import UserError
from gradmap.methods.selection import Advance, ReducedModelScorer, Selection, Subject
from gradmap.model.architectures import Architecture
from gradmap.model.batching import FORWARD_BATCH
from gradmap.model.layerwise import sample_losses


class MagnitudeScorer:
    """Sum of |w| over the weights of a layer, norms included. Removals change nothing about it."""

    def __init__(self, subject: Subject) -> None:
        _refuse_streamed(subject, "magnitude")
        self._subject = subject

    def work(self, alive: int) -> int:
        return alive

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        removed = so_far.removal_order
        layers = self._subject.architecture.layer_list(self._subject.model)
        scores = {}
        for index in self._subject.alive(removed):
            scores[index] = sum(
                weight.double().abs().sum().item() for weight in layers[index].parameters()
            )
            advance(1)
        return scores


def taylor(subject: Subject) -> ReducedModelScorer:
    """Sum of |w dL/dw| over the weights of a layer, norms included; L is the loss of all samples
    together."""
    _refuse_streamed(subject, "taylor")
    return ReducedModelScorer(subject, taylor_scores)


def taylor_scores(
    model: Any, architecture: Architecture, input_ids: Tensor, advance: Advance = lambda n: None
) -> Tensor:
    """The score of every layer: (L,) float64. Forms the gradient of every weight. input_ids: (N,
    T)."""
    layers = architecture.layer_list(model)
    of_layers = [list(layer.parameters()) for layer in layers]
    weights = [weight for of_layer in of_layers for weight in of_layer]
    gradients = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for batch in share_of(input_ids)[0].split(FORWARD_BATCH):
            batch = batch.to(model.device)
            loss = sample_losses(model(input_ids=batch, use_cache=False).logits, batch).sum()
            # a weight may be idle in a batch: an expert that no token is routed to
            for total, part in zip(
                gradients, torch.autograd.grad(loss, weights, allow_unused=True), strict=True
            ):
                if part is not None:
                    total += part
            advance(len(layers) * len(batch))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    products = [
        weight * summed(gradient) for weight, gradient in zip(weights, gradients, strict=True)
    ]
    sizes = iter([product.double().abs().sum().item() for product in products])
    return torch.tensor(
        [sum(next(sizes) for _ in of_layer) for of_layer in of_layers], dtype=torch.float64
    )


def _refuse_streamed(subject: Subject, name: str) -> None:
    if subject.streamed:
        raise UserError(
            f"--selector {name} needs all weights in memory; leave out --stream, or use gradient."
        )
