"""LLM-Streamline (Chen et al. 2024, arXiv 2403.19135), and LinearPatch (arXiv 2505.24680) after it:
the one block of consecutive layers that turns the hidden state least goes, all of it at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradmap.common.distributed import share_of, summed
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite_scores
from gradmap.methods.selection import Advance, Selection, Subject
from gradmap.model.architectures import Architecture
from gradmap.model.batching import forward_batch
from gradmap.model.layerwise import layer_passes, stacked_on_cpu


class WindowScorer:
    """Scores the layers of the chosen block alone, all with its influence. Of equal blocks the
    first one goes."""

    def __init__(self, subject: Subject) -> None:
        """Raises UserError if the protected layers leave no room for a block of `subject.count`
        layers."""
        last = len(subject.layers) - subject.count
        self._windows = [range(first, first + subject.count) for first in range(last + 1)]
        self._allowed = [
            window for window in self._windows if not subject.protected.intersection(window)
        ]
        if not self._allowed:
            raise UserError(
                f"The protected layers leave no {subject.count} consecutive ones to remove; "
                "protect or remove fewer."
            )
        self._subject = subject

    def work(self, alive: int) -> int:
        return alive * len(share_of(self._subject.calibration.input_ids)[0])

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        subject = self._subject
        influences = window_influences(
            subject.model,
            subject.architecture,
            subject.calibration.input_ids,
            subject.count,
            advance,
        )
        of_window = dict(zip(self._windows, influences.tolist(), strict=True))
        require_finite_scores({window[0]: influence for window, influence in of_window.items()})
        best = min(self._allowed, key=of_window.__getitem__)
        return dict.fromkeys(best, of_window[best])


@torch.no_grad()
def window_influences(
    model: Any,
    architecture: Architecture,
    input_ids: Tensor,
    count: int,
    advance: Advance = lambda n: None,
) -> Tensor:
    """1 - E[cos(h_i, h_i+count)] over samples and positions, for every block of `count` layers: (L
    - count + 1,) float64. input_ids: (N, T)."""
    layers = architecture.layer_list(model)
    totals = torch.zeros(len(layers) - count + 1, dtype=torch.float64)
    for batch in share_of(input_ids)[0].split(forward_batch(input_ids, model.device)):
        entering: list[Tensor] = []  # the last `count` of them
        turned: list[Tensor] = []
        for before, leaving in layer_passes(model, layers, batch.to(model.device)):
            entering.append(before)
            if len(entering) == count:
                first = entering.pop(0)
                turned.append(
                    (1 - cosine_similarity(first, leaving.to(first.device), dim=-1)).double().sum()
                )
        totals += stacked_on_cpu(turned)
        advance(len(layers) * len(batch))
    return summed(totals) / input_ids.numel()


def window_influences_reference(model: Any, input_ids: Tensor, count: int) -> list[float]:
    """The same of each block by itself, from the hidden states that transformers returns. What
    leaves the last layer is not among them as it is, but behind the last norm, so that the last
    block is left out."""
    states = model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states[
        :-1
    ]
    influences = []
    for first, last in zip(states, states[count:], strict=False):
        cosines = (first * last).sum(dim=-1) / (first.norm(dim=-1) * last.norm(dim=-1))
        influences.append(1 - cosines.mean().item())
    return influences
