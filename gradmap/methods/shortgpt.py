"""ShortGPT (Men et al. 2024, arXiv 2403.03853): a layer that hardly turns the hidden state is
redundant. Prune&Comp (arXiv 2507.18212) asks the same after every removal was made up for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradmap.common.distributed import share_of, summed
from gradmap.methods.prune_comp import magnitude_ratio, scales_behind
from gradmap.methods.selection import Advance, ReducedModelScorer, Selection, Subject
from gradmap.model.architectures import Architecture
from gradmap.model.batching import forward_batch
from gradmap.model.corrections import Changes, followed_by, pruned_and_corrected
from gradmap.model.layerwise import layer_passes, stacked_on_cpu


def block_influence(subject: Subject) -> ReducedModelScorer:
    """BI_i = 1 - E[cos(h_i, h_i+1)] over samples and positions, of the hidden states before and
    after layer i."""
    return ReducedModelScorer(subject, block_influences)


class CompensatedInfluenceScorer:
    """Block influence in the model whose later layers were scaled after every removal: Prune&Comp's
    loop.

    Whatever the scales do to the loss; `--compensator magnitude` computes them again, and keeps
    those that help.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._removed: tuple[int, ...] = ()
        self._changes: Changes = {}

    def work(self, alive: int) -> int:
        return alive * len(share_of(self._subject.calibration.input_ids)[0])

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        subject = self._subject
        model, architecture = subject.model, subject.architecture
        for layer in so_far.removal_order[len(self._removed) :]:
            ids, gone = subject.calibration.fit_ids, self._removed
            batch_size = forward_batch(ids, model.device)
            ratio = magnitude_ratio(
                model, architecture, ids, layer, gone, self._changes, batch_size
            )
            self._changes = followed_by(
                self._changes, scales_behind(architecture, model, layer, ratio)
            )
            self._removed += (layer,)
        with pruned_and_corrected(model, architecture, self._removed, self._changes):
            influences = block_influences(
                model, architecture, subject.calibration.input_ids, advance
            )
        return dict(zip(subject.alive(self._removed), influences.tolist(), strict=True))


@torch.no_grad()
def block_influences(
    model: Any, architecture: Architecture, input_ids: Tensor, advance: Advance = lambda n: None
) -> Tensor:
    """The influence of every layer that the model has now: (L,) float64. input_ids: (N, T)."""
    layers = architecture.layer_list(model)
    totals = torch.zeros(len(layers), dtype=torch.float64)
    for batch in share_of(input_ids)[0].split(forward_batch(input_ids, model.device)):
        turned = [
            (1 - cosine_similarity(entering, leaving.to(entering.device), dim=-1)).double().sum()
            for entering, leaving in layer_passes(model, layers, batch.to(model.device))
        ]
        totals += stacked_on_cpu(turned)
        advance(len(layers) * len(batch))
    return summed(totals) / input_ids.numel()
