"""Prune&Comp (arXiv 2507.18212): later layers expect a hidden state as large as the removed layer
would have left it. Its selector asks for block influence, after every removal was made up for.

With alpha, the factor by which a layer makes the hidden state larger, the paper multiplies the
embeddings and what earlier layers add by alpha. Layers normalise what they read, so it comes to the
same to divide what later layers add by alpha: then all of the hidden state is smaller by alpha,
which the final norm takes out. That needs no change of the embeddings, which may be tied to the
head, and is as exact: but for the epsilon of the norms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmap.common.console import progress
from gradmap.common.distributed import share_of, summed
from gradmap.methods.base import Compensator, Selector
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.selection import Selection, Subject
from gradmap.methods.shortgpt import block_influences
from gradmap.model.batching import Batches, forward_batch
from gradmap.model.corrections import Change, Changes, Place, Scale, followed_by
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.sublayers import Pair, sublayers_left, sublayers_of
from gradmap.model.walk import Walk


class CompensatedInfluenceScorer:
    """Block influence in the model whose later layers were scaled after every removal: the paper's
    loop.

    Whatever the scales do to the loss; `--compensator magnitude` computes them again, and keeps
    those that help.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._removed: tuple[Pair, ...] = ()
        self._changes: Changes = {}

    def work(self, alive: int) -> int:
        return alive * len(share_of(self._subject.calibration.input_ids)[0])

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        model, calibration = self._subject.model, self._subject.calibration
        for pair in so_far.removal_order[len(self._removed) :]:
            ids, gone = calibration.fit_ids, self._removed
            batches = Batches(forward_batch(ids, model.device))
            ratio = magnitude_ratio(model, ids, pair, gone, self._changes, batches)
            self._changes = followed_by(self._changes, scales_behind(model, pair, ratio))
            self._removed += (pair,)
        unit = self._subject.unit
        with model.changed(self._changes, without=self._removed):
            influences = block_influences(model, calibration.input_ids, unit, advance)
        return dict(zip(self._subject.candidates(self._removed), influences.tolist(), strict=True))


def scale_after_removals(pruned: Pruned) -> Compensation:
    """One alpha for every removal, in their order, each measured with those before it in place."""
    model = pruned.model
    changes: Changes = {}
    with progress("Measuring magnitudes (layers)", len(pruned.removed)) as advance:
        for position, pair in enumerate(pruned.removed):
            ids, gone = pruned.calibration.fit_ids, pruned.removed[:position]
            ratio = magnitude_ratio(model, ids, pair, gone, changes, pruned.batches)
            changes = followed_by(changes, scales_behind(model, pair, ratio))
            advance(1)
    kept = [model.output_of(sublayer) for sublayer in pruned.kept]
    scales_of_kept = [(place, _product(changes[place])) for place in kept if place in changes]
    return Compensation(pruned.judge(scales_of_kept, {}))


@torch.no_grad()
def magnitude_ratio(
    model: LayeredModel,
    input_ids: Tensor,
    pair: Pair,
    gone: Sequence[Pair],
    changes: Changes,
    batches: Batches,
) -> float:
    """alpha: mean |output| / mean |input| of what is removed, over the positions of a sample for
    each channel, then averaged over samples and channels. In the model without what is `gone`, with
    `changes`. input_ids: (N, T)."""
    walk = Walk(model, sublayers_left(len(model.layers), gone), input_ids, batches)
    walk.go_to(pair.first, changes)
    entering = walk.hidden.double().abs().mean(dim=1)
    walk.go_behind(pair.second, changes)
    leaving = walk.hidden.double().abs().mean(dim=1)
    total = (leaving / entering).mean(dim=1).sum().cpu()
    return summed(total).item() / len(input_ids)


def scales_behind(model: LayeredModel, pair: Pair, ratio: float) -> list[tuple[Place, Scale]]:
    """What later sublayers add, over `ratio`."""
    scale = Scale(1 / torch.tensor(ratio, dtype=torch.float64))
    behind = [
        sublayer for sublayer in sublayers_of(range(len(model.layers))) if sublayer > pair.second
    ]
    return [(model.output_of(sublayer), scale) for sublayer in behind]


def _product(scales: Sequence[Change]) -> Scale:
    factor = torch.ones((), dtype=torch.float64)
    for scale in scales:
        factor = scale.fold(factor)
    return Scale(factor)


PAPER = "Prune&Comp (arXiv 2507.18212)"
SELECTOR = Selector(
    name="prune-comp",
    about="the layer that turns the hidden state least, after every removal was made up for",
    paper=PAPER,
    make=CompensatedInfluenceScorer,
    score_label="block influence",
    round_takes="one forward pass, and one to measure the last removal",
)
COMPENSATOR = Compensator(
    name="magnitude",
    about="scales what later layers add by how much larger a removed layer made the hidden state",
    paper=PAPER,
    run=scale_after_removals,
    linear_output=True,
)
