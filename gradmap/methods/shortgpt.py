"""ShortGPT (Men et al. 2024, arXiv 2403.03853): a layer that hardly turns the hidden state is
redundant."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradmap.costs.steps import influence_flops
from gradmap.costs.timing import in_rounds
from gradmap.methods.base import Selector
from gradmap.methods.selection import ReducedModelScorer, Subject
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.layerwise import layer_passes, stacked_on_cpu


def block_influence(subject: Subject) -> ReducedModelScorer:
    """BI_i = 1 - E[cos(h_i, h_i+1)] over samples and positions, of the hidden states before and
    after layer i."""
    return ReducedModelScorer(subject, block_influences)


@torch.no_grad()
def block_influences(
    model: LayeredModel, input_ids: Tensor, advance: Advance = lambda n: None
) -> Tensor:
    """The influence of every layer that the model has now: (L,) float64. input_ids: (N, T)."""

    def of_batch(batch: Tensor) -> Tensor:
        return stacked_on_cpu(
            [turned(entering, leaving) for entering, leaving in layer_passes(model, batch)]
        )

    return model.total(input_ids, of_batch, advance) / input_ids.numel()


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
