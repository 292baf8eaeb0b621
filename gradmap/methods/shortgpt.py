"""ShortGPT (Men et al. 2024, arXiv 2403.03853): a layer that hardly turns the hidden state is
redundant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradmap.costs.steps import influence_flops
from gradmap.costs.timing import in_rounds
from gradmap.methods.base import Selector
from gradmap.methods.selection import ReducedModelScorer, Subject
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.layerwise import passes, stacked_on_cpu
from gradmap.model.sublayers import PIECES, Unit

# How far a hidden state is turned on its way: of what enters and what leaves, (B, T, d) both, the
# sum over samples, () float64.
Turn = Callable[[Tensor, Tensor], Tensor]


def block_influence(subject: Subject) -> ReducedModelScorer:
    """BI_i = 1 - E[cos(h_i, h_i+1)] over samples and positions, of the hidden states before and
    after layer i, or a pair of sublayers."""
    return ReducedModelScorer(subject, block_influences)


def block_influences(
    model: LayeredModel,
    input_ids: Tensor,
    unit: Unit = "layer",
    advance: Advance = lambda n: None,
    count: int = 1,
) -> Tensor:
    """The influence of every so many units in a row that the model has now: (C,) float64.
    input_ids: (N, T)."""
    return block_turns(model, input_ids, turned, unit, advance, count) / input_ids.numel()


@torch.no_grad()
def block_turns(
    model: LayeredModel, input_ids: Tensor, turn: Turn, unit: Unit, advance: Advance, count: int
) -> Tensor:
    """How far every so many units in a row turn the hidden state, the sum over samples: (C,)
    float64. input_ids: (N, T)."""
    width = count * PIECES[unit]

    def of_batch(batch: Tensor) -> Tensor:
        entering: list[Tensor] = []  # the last `width` of them
        turns: list[Tensor] = []
        for before, leaving in passes(model, batch, unit):
            entering.append(before)
            if len(entering) == width:
                turns.append(turn(entering.pop(0), leaving))
        return stacked_on_cpu(turns)

    return model.total(input_ids, of_batch, advance)


def turned(entering: Tensor, leaving: Tensor) -> Tensor:
    """1 - cos of two hidden states (B, T, d), summed over samples and positions: () float64."""
    cosines = cosine_similarity(entering, leaving.to(entering.device), dim=-1)
    return (1 - cosines).double().sum()


SELECTOR = Selector(
    name="block-influence",
    about="the layer that turns the hidden state least",
    paper="ShortGPT (arXiv 2403.03853)",
    make=block_influence,
    score_label="block influence",
    round_takes="one forward pass",
    seconds=in_rounds(influence_flops),
)
