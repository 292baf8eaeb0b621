"""GradPruner (arXiv 2601.19503): the first steps of LoRA fine-tuning tell which weights matter.

With LoRA's factors B A in place of an update of W, the gradient of W is taken to be grad B grad A.
Its square, averaged over the steps, is the importance of every weight (the paper's IGIA matrix).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from gradmap.common.console import progress
from gradmap.common.distributed import say_if_some_are_idle, share_of_step, sum_gradients
from gradmap.common.finite import require_finite_losses
from gradmap.methods.base import Compensator, Selector
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.merging import NO_EXPERTS, WHOLE_LAYERS, merge_runs
from gradmap.methods.selection import FixedScores, Subject
from gradmap.model.corrections import LowRank, Place, untrained_low_rank
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import losses_from, run_layers, stacked_on_cpu
from gradmap.model.sublayers import Sublayer, sublayers_of

RANK = 8
STEPS = 40
STEP_SAMPLES = 8
LEARNING_RATE = 2e-4  # the paper does not say
MERGED_SHARE = 0.2  # of a removed layer's weights


def first_steps_of_tuning(subject: Subject) -> FixedScores:
    """What goes is that whose weights matter least in the first steps of fine-tuning."""
    calibration = subject.calibration
    importances = importances_of_sublayers(subject.model, calibration.fit_ids, calibration.seed)
    return FixedScores(subject, importances)


def merge_where_signs_agree(pruned: Pruned) -> Compensation:
    """The most important weights of a removed layer are added where the retained one's have their
    sign."""
    calibration = pruned.calibration
    removed = [pair.first.layer for pair in pruned.removed]
    importances = weight_importances(pruned.model, calibration.fit_ids, calibration.seed, removed)

    def merge(weight: Tensor, removed: Tensor, kept: Place, source: Place) -> Tensor:
        importance = importances[source]
        rank = math.ceil((1 - MERGED_SHARE) * importance.numel())
        important = importance > importance.flatten().kthvalue(rank).values
        return weight + removed * (important & (weight.sign() == removed.sign()))

    return merge_runs(pruned, merge)


def importances_of_sublayers(
    model: LayeredModel, input_ids: Tensor, seed: int
) -> dict[Sublayer, float]:
    """The importances of a sublayer's weights, summed up. input_ids: (N, T)."""
    totals = dict.fromkeys(sublayers_of(range(len(model.layers))), torch.zeros(()).double())
    for gradients in lora_gradients(model, input_ids, seed):
        for place, (up, down) in gradients.items():
            # |B A|^2 = tr(B^T B A A^T), without the product
            importance = ((up.mT @ up) * (down @ down.mT)).sum().double() / STEPS
            sublayer = model.architecture.sublayer_of(*place)
            totals[sublayer] = totals[sublayer] + importance
    return dict(zip(totals, stacked_on_cpu(list(totals.values())).tolist(), strict=True))


def weight_importances(
    model: LayeredModel, input_ids: Tensor, seed: int, layers: Sequence[int]
) -> dict[Place, Tensor]:
    """The importance of every weight of these layers' linear maps, (d_out, d_in). input_ids:
    (N, T)."""
    totals: dict[Place, Tensor] = {}
    for gradients in lora_gradients(model, input_ids, seed):
        for place, (up, down) in gradients.items():
            if place.layer in layers:
                totals[place] = totals.get(place, 0) + (up @ down).square() / STEPS
    return totals


def lora_gradients(
    model: LayeredModel, input_ids: Tensor, seed: int
) -> Iterator[dict[Place, tuple[Tensor, Tensor]]]:
    """For every step, the gradients of B (d_out, r) and A (r, d_in) of every linear map. The model
    stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    maps = model.linear_maps(sublayers_of(range(len(model.layers))))
    factors = {place: untrained_low_rank(module, RANK, generator) for place, module in maps}
    parameters = [tensor for factor in factors.values() for tensor in (factor.up, factor.down)]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    say_if_some_are_idle(STEP_SAMPLES)
    with progress("First steps of LoRA", STEPS) as advance:
        for rows in islice(_rows(len(input_ids), generator), STEPS):
            optimizer.zero_grad()
            _backward(model, input_ids, rows, factors)
            sum_gradients(parameters)
            yield {place: _gradients(factor) for place, factor in factors.items()}
            optimizer.step()
            advance(1)


def _backward(
    model: LayeredModel,
    input_ids: Tensor,
    rows: Tensor,
    factors: dict[Place, LowRank],
) -> None:
    """Adds the gradients of the mean loss per token of these samples of input_ids (N, T)."""
    own = share_of_step(rows)
    if not len(own):
        return
    ids = input_ids[own].to(model.device)
    with model.changed({place: (factor,) for place, factor in factors.items()}):
        losses = losses_from(model, run_layers(model, ids), ids)
        require_finite_losses(losses.detach(), own.tolist())
        (losses.sum() / (len(rows) * input_ids.shape[1])).backward()


def _rows(samples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endlessly, the samples in random order, so many at once as a step takes."""
    while True:
        yield from torch.randperm(samples, generator=generator).split(STEP_SAMPLES)


def _gradients(factor: LowRank) -> tuple[Tensor, Tensor]:
    assert factor.up.grad is not None
    assert factor.down.grad is not None
    return factor.up.grad, factor.down.grad


PAPER = "GradPruner (arXiv 2601.19503)"
SELECTOR = Selector(
    name="gradpruner",
    about="the layer whose weights matter least in the first steps of fine-tuning",
    paper=PAPER,
    make=first_steps_of_tuning,
    in_memory=True,
    score_label="squared gradients in the first steps",
    round_takes="nothing; 40 steps of LoRA once",
)
COMPENSATOR = Compensator(
    name="gradpruner",
    about="adds a removed layer's most important weights to the one before it, where signs agree",
    paper=PAPER,
    run=merge_where_signs_agree,
    in_memory=True,
    whole_layers=WHOLE_LAYERS,
    no_experts=NO_EXPERTS,
)
