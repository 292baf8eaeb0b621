"""UIDL (Gromov et al. 2024, arXiv 2403.17887): the one block of consecutive layers goes between
whose ends the hidden state of a sample's last token turns by the smallest angle."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradmap.costs.timing import in_rounds
from gradmap.methods.base import Selector
from gradmap.methods.selection import Subject
from gradmap.methods.shortgpt import block_turns
from gradmap.methods.streamline import BlockScorer, one_pass_flops, require_room
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.sublayers import Unit


def block_of_least_angle(subject: Subject) -> BlockScorer:
    """By angular distance at the last token of each sample."""
    return BlockScorer(subject, angular_distances)


def angular_distances(
    model: LayeredModel,
    input_ids: Tensor,
    unit: Unit = "layer",
    advance: Advance = lambda n: None,
    count: int = 1,
) -> Tensor:
    """d = arccos(cos(h_l, h_l+n)) / pi at the last token, the mean over samples, of every so many
    units in a row: (C,) float64 between 0 and 1. input_ids: (N, T)."""
    return block_turns(model, input_ids, last_angles, unit, advance, count) / len(input_ids)


def last_angles(entering: Tensor, leaving: Tensor) -> Tensor:
    """The angular distances of two hidden states (B, T, d) at the last position, summed over
    samples: () float64.

    In float64, for near a cosine of 1 the angle has but half of its digits.
    """
    before, behind = entering[:, -1].double(), leaving[:, -1].double()
    cosines = cosine_similarity(before, behind.to(before.device), dim=-1)
    return cosines.clamp(-1, 1).arccos().sum() / math.pi


@torch.no_grad()
def angular_distances_reference(model: Any, input_ids: Tensor, count: int) -> list[float]:
    """`angular_distances` of each block of layers, a sample at a time, from the hidden states that
    transformers returns. The last block is left out: what leaves the last layer is behind the last
    norm there. input_ids: (N, T)."""
    states = model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states
    distances = []
    for first, last in zip(states[:-1], states[count:-1], strict=False):
        angles = [
            math.acos(before @ behind / (before.norm() * behind.norm())) / math.pi
            for before, behind in zip(first[:, -1], last[:, -1], strict=True)
        ]
        distances.append(sum(angles) / len(angles))
    return distances


SELECTOR = Selector(
    name="uidl",
    about="the one block of consecutive layers with the smallest angle between what enters and "
    "what leaves it, at the last token",
    paper="UIDL (arXiv 2403.17887)",
    make=block_of_least_angle,
    check=require_room,
    nested=False,
    score_label="angular distance of the block",
    round_takes="one forward pass, once",
    seconds=in_rounds(one_pass_flops),
)
