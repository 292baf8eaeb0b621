"""Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834): scores of the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmap.common.distributed import summed
from gradmap.costs.steps import taylor_flops
from gradmap.costs.timing import in_rounds, no_seconds
from gradmap.methods.base import Selector
from gradmap.methods.selection import (
    FixedScores,
    ReducedModelScorer,
    Subject,
    scores_of_units,
)
from gradmap.model.batching import FORWARD_BATCH
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.layerwise import sample_losses
from gradmap.model.sublayers import Unit


def magnitude(subject: Subject) -> FixedScores:
    """Sum of |w| over the weights of what goes, norms included. Removals change nothing about
    it."""
    sizes = [
        sum(weight.double().abs().sum().item() for weight in piece.parameters())
        for piece in subject.model.pieces("pair")
    ]
    return FixedScores(subject, dict(zip(subject.left(()), sizes, strict=True)))


def taylor(subject: Subject) -> ReducedModelScorer:
    """Sum of |w dL/dw| over the weights of a layer, norms included; L is the loss of all samples
    together."""
    return ReducedModelScorer(subject, taylor_scores)


def taylor_scores(
    model: LayeredModel,
    input_ids: Tensor,
    unit: Unit = "layer",
    advance: Advance = lambda n: None,
) -> Tensor:
    """The score of every candidate: (C,) float64. Forms the gradient of every weight. input_ids:
    (N, T)."""
    of_pieces = [list(piece.parameters()) for piece in model.pieces(unit)]
    weights = [weight for of_piece in of_pieces for weight in of_piece]
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
    sums = [sum(next(sizes) for _ in of_piece) for of_piece in of_pieces]
    return scores_of_units(torch.tensor(sums, dtype=torch.float64), unit)


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
