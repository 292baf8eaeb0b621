"""Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834): scores of the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmap.common.distributed import summed
from gradmap.costs.steps import taylor_flops
from gradmap.costs.timing import in_rounds, no_seconds
from gradmap.methods.base import Selector
from gradmap.methods.selection import FixedScores, ReducedModelScorer, Subject
from gradmap.model.batching import FORWARD_BATCH
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.layerwise import sample_losses


def magnitude(subject: Subject) -> FixedScores:
    """Sum of |w| over the weights of a layer, norms included. Removals change nothing about it."""
    return FixedScores(
        {
            index: sum(weight.double().abs().sum().item() for weight in layer.parameters())
            for index, layer in enumerate(subject.model.layers)
        }
    )


def taylor(subject: Subject) -> ReducedModelScorer:
    """Sum of |w dL/dw| over the weights of a layer, norms included; L is the loss of all samples
    together."""
    return ReducedModelScorer(subject, taylor_scores)


def taylor_scores(
    model: LayeredModel, input_ids: Tensor, advance: Advance = lambda n: None
) -> Tensor:
    """The score of every layer: (L,) float64. Forms the gradient of every weight. input_ids: (N,
    T)."""
    of_layers = [list(layer.parameters()) for layer in model.layers]
    weights = [weight for of_layer in of_layers for weight in of_layer]
    gradients = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for batch in model.batches(input_ids, advance, FORWARD_BATCH):
            logits = model.network(input_ids=batch, use_cache=False).logits
            loss = sample_losses(logits, batch).sum()
            # a weight may be idle in a batch: an expert that no token is routed to
            parts = torch.autograd.grad(loss, weights, allow_unused=True)
            for total, part in zip(gradients, parts, strict=True):
                if part is not None:
                    total += part
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    products = [weight * summed(total) for weight, total in zip(weights, gradients, strict=True)]
    sizes = iter([product.double().abs().sum().item() for product in products])
    scores = [sum(next(sizes) for _ in of_layer) for of_layer in of_layers]
    return torch.tensor(scores, dtype=torch.float64)


MAGNITUDE = Selector(
    name="magnitude",
    about="the layer whose weights are smallest",
    paper="Shortened LLaMA (arXiv 2402.02834)",
    make=magnitude,
    in_memory=True,
    score_label="sum of |weight|",
    round_takes="nothing but a look at the weights",
    seconds=no_seconds,
)
TAYLOR = Selector(
    name="taylor",
    about="the layer whose weights, each times its gradient, are smallest",
    paper="Shortened LLaMA (arXiv 2402.02834)",
    make=taylor,
    in_memory=True,
    score_label="sum of |weight x gradient|",
    round_takes="one forward and one backward pass with all weight gradients",
    seconds=in_rounds(taylor_flops),
)
