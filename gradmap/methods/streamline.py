"""LLM-Streamline (Chen et al. 2024, arXiv 2403.19135), and LinearPatch (arXiv 2505.24680) after it:
the one block of consecutive layers that turns the hidden state least goes, all of it at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from gradmap.common.distributed import share_of
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite_scores
from gradmap.costs.steps import CalibrationSize, influence_flops
from gradmap.costs.timing import in_rounds
from gradmap.methods.base import Job, Selector
from gradmap.methods.selection import Selection, Subject
from gradmap.methods.shortgpt import block_influences
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.shape import Shape
from gradmap.model.sublayers import PIECES, Pair, Unit, candidates, pieces, sublayers_of

# What each block of so many units in a row is worth, (C,) float64, from samples (N, T).
BlockMeasure = Callable[[LayeredModel, Tensor, Unit, Advance, int], Tensor]


def windows(places: int, count: int) -> list[range]:
    """All blocks of so many consecutive places."""
    return [range(first, first + count) for first in range(places - count + 1)]


def blocks(layers: int, count: int, unit: Unit) -> list[tuple[Pair, ...]]:
    """All blocks of so many units in a row, front to back."""
    found = pieces(sublayers_of(range(layers)), unit)
    return [
        tuple(candidates(list(chain.from_iterable(found[place] for place in window)), "layer"))
        for window in windows(len(found), count * PIECES[unit])
    ]


def require_room(job: Job, options: None) -> None:
    """Raises UserError if the protected layers leave no room for a block of `job.remove` layers."""
    if not any(
        _is_allowed(block, job.protected) for block in blocks(job.layers, job.remove, job.unit)
    ):
        raise UserError(
            f"The protected layers leave no {job.remove} consecutive ones to remove; protect or "
            "remove fewer."
        )


def _is_allowed(block: Sequence[Pair], protected: Collection[int]) -> bool:
    return not any(pair.is_in(protected) for pair in block)


def least_turning_block(subject: Subject) -> BlockScorer:
    """By block influence: over all positions of the samples."""
    return BlockScorer(subject, block_influences)


class BlockScorer:
    """Scores what is in the block of the lowest measure alone, all with that. Of equal blocks the
    first one goes."""

    def __init__(self, subject: Subject, measure: BlockMeasure) -> None:
        self._subject, self._measure = subject, measure
        self._blocks = blocks(len(subject.layers), subject.count, subject.unit)

    def work(self, alive: int) -> int:
        return alive * len(share_of(self._subject.calibration.input_ids)[0])

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        subject = self._subject
        measured = self._measure(
            subject.model, subject.calibration.input_ids, subject.unit, advance, subject.count
        )
        of_block = dict(zip(self._blocks, measured.tolist(), strict=True))
        require_finite_scores({block[0].words: found for block, found in of_block.items()})
        allowed = [block for block in of_block if _is_allowed(block, subject.protected)]
        best = min(allowed, key=of_block.__getitem__)
        return dict.fromkeys(best, of_block[best])


def block_influences_reference(model: Any, input_ids: Tensor, count: int) -> list[float]:
    """`block_influences` of each block of layers by itself, from the hidden states that
    transformers returns. What leaves the last layer is not among them as it is, but behind the last
    norm, so that the last block is left out. input_ids: (N, T)."""
    states = model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states
    influences = []
    for first, last in zip(states[:-1], states[count:-1], strict=False):
        cosines = (first * last).sum(dim=-1) / (first.norm(dim=-1) * last.norm(dim=-1))
        influences.append(1 - cosines.mean().item())
    return influences


def one_pass_flops(shape: Shape, rounds: int, size: CalibrationSize) -> float:
    """However many layers go, all of the model's are passed once."""
    return influence_flops(shape, 1, size)


SELECTOR = Selector(
    name="window",
    about="the one block of consecutive layers that turns the hidden state least",
    paper="LLM-Streamline (arXiv 2403.19135), LinearPatch (arXiv 2505.24680)",
    make=least_turning_block,
    check=require_room,
    nested=False,
    score_label="influence of the block",
    round_takes="one forward pass, once",
    seconds=in_rounds(one_pass_flops),
)
