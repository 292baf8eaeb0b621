"""LLM-Streamline (Chen et al. 2024, arXiv 2403.19135), and LinearPatch (arXiv 2505.24680) after it:
the one block of consecutive layers that turns the hidden state least goes, all of it at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmap.common.distributed import share_of
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite_scores
from gradmap.costs.steps import CalibrationSize, influence_flops
from gradmap.costs.timing import in_rounds
from gradmap.methods.base import Job, Selector
from gradmap.methods.selection import Selection, Subject
from gradmap.methods.shortgpt import turned
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.layerwise import layer_passes, stacked_on_cpu
from gradmap.model.shape import Shape


def windows(layers: int, count: int) -> list[range]:
    """All blocks of so many consecutive layers."""
    return [range(first, first + count) for first in range(layers - count + 1)]


def require_room(job: Job, options: None) -> None:
    """Raises UserError if the protected layers leave no room for a block of `job.remove` layers."""
    if all(job.protected.intersection(window) for window in windows(job.layers, job.remove)):
        raise UserError(
            f"The protected layers leave no {job.remove} consecutive ones to remove; protect or "
            "remove fewer."
        )


class WindowScorer:
    """Scores the layers of the chosen block alone, all with its influence. Of equal blocks the
    first one goes."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._windows = windows(len(subject.layers), subject.count)

    def work(self, alive: int) -> int:
        return alive * len(share_of(self._subject.calibration.input_ids)[0])

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        subject = self._subject
        influences = window_influences(
            subject.model, subject.calibration.input_ids, subject.count, advance
        )
        of_window = dict(zip(self._windows, influences.tolist(), strict=True))
        require_finite_scores({window[0]: influence for window, influence in of_window.items()})
        allowed = [window for window in self._windows if subject.protected.isdisjoint(window)]
        best = min(allowed, key=of_window.__getitem__)
        return dict.fromkeys(best, of_window[best])


@torch.no_grad()
def window_influences(
    model: LayeredModel, input_ids: Tensor, count: int, advance: Advance = lambda n: None
) -> Tensor:
    """1 - E[cos(h_i, h_i+count)] over samples and positions, for every block of `count` layers:
    (L - count + 1,) float64. input_ids: (N, T)."""

    def of_batch(batch: Tensor) -> Tensor:
        entering: list[Tensor] = []  # the last `count` of them
        influences: list[Tensor] = []
        for before, leaving in layer_passes(model, batch):
            entering.append(before)
            if len(entering) == count:
                influences.append(turned(entering.pop(0), leaving))
        return stacked_on_cpu(influences)

    return model.total(input_ids, of_batch, advance) / input_ids.numel()


def window_influences_reference(model: Any, input_ids: Tensor, count: int) -> list[float]:
    """`window_influences` of each block by itself, from the hidden states that transformers
    returns. What leaves the last layer is not among them as it is, but behind the last norm, so
    that the last block is left out. input_ids: (N, T)."""
    states = model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states
    influences = []
    for first, last in zip(states[:-1], states[count:-1], strict=False):
        cosines = (first * last).sum(dim=-1) / (first.norm(dim=-1) * last.norm(dim=-1))
        influences.append(1 - cosines.mean().item())
    return influences


def _flops(shape: Shape, rounds: int, size: CalibrationSize) -> float:
    return influence_flops(shape, 1, size)


SELECTOR = Selector(
    name="window",
    about="the one block of consecutive layers that turns the hidden state least",
    paper="LLM-Streamline (arXiv 2403.19135), LinearPatch (arXiv 2505.24680)",
    make=WindowScorer,
    check=require_room,
    nested=False,
    score_label="influence of the block",
    round_takes="one forward pass, once",
    seconds=in_rounds(_flops),
)
