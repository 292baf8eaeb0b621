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
from gradmap.common.distributed import share_of
from gradmap.methods.base import Compensator, Selector
from gradmap.methods.compensation import Compensation, Pruned, run_and_capture
from gradmap.methods.selection import Selection, Subject
from gradmap.methods.shortgpt import block_influences
from gradmap.model.batching import forward_batch
from gradmap.model.corrections import Change, Changes, Place, Scale, followed_by
from gradmap.model.layered import Advance, LayeredModel


class CompensatedInfluenceScorer:
    """Block influence in the model whose later layers were scaled after every removal: the paper's
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
        model, calibration = self._subject.model, self._subject.calibration
        for layer in so_far.removal_order[len(self._removed) :]:
            ids, gone = calibration.fit_ids, self._removed
            batch_size = forward_batch(ids, model.device)
            ratio = magnitude_ratio(model, ids, layer, gone, self._changes, batch_size)
            self._changes = followed_by(self._changes, scales_behind(model, layer, ratio))
            self._removed += (layer,)
        with model.changed(self._changes, without=self._removed):
            influences = block_influences(model, calibration.input_ids, advance)
        return dict(zip(self._subject.alive(self._removed), influences.tolist(), strict=True))


def scale_after_removals(pruned: Pruned) -> Compensation:
    """One alpha for every removed layer, in the order of removal, each measured with those before
    it in place."""
    model = pruned.model
    changes: Changes = {}
    with progress("Measuring magnitudes (layers)", len(pruned.removed)) as advance:
        for position, layer in enumerate(pruned.removed):
            ids, gone = pruned.calibration.fit_ids, pruned.removed[:position]
            ratio = magnitude_ratio(model, ids, layer, gone, changes, pruned.batches.size)
            changes = followed_by(changes, scales_behind(model, layer, ratio))
            advance(1)
    pairs = [
        (place, _product(scales)) for place, scales in changes.items() if place.layer in pruned.kept
    ]
    return Compensation(pruned.judge(pairs, {}))


def magnitude_ratio(
    model: LayeredModel,
    input_ids: Tensor,
    layer: int,
    gone: Sequence[int],
    changes: Changes,
    batch_size: int,
) -> float:
    """alpha: mean |output| / mean |input| of a layer, over the positions of a sample for each
    channel, then averaged over samples and channels. In the model without the layers that are
    `gone`, with `changes`. input_ids: (N, T)."""
    looked_at = model.layers[layer]
    behind = {*gone, *range(layer + 1, len(model.layers))}

    def of_batch(batch: Tensor) -> Tensor:
        ((entering, leaving),) = run_and_capture(model, [looked_at], batch)
        ratios = leaving.double().abs().mean(dim=1) / entering.double().abs().mean(dim=1)
        return ratios.mean(dim=1).sum()

    with model.changed(changes, without=sorted(behind)):
        return model.total(input_ids, of_batch, size=batch_size).item() / len(input_ids)


def scales_behind(model: LayeredModel, layer: int, ratio: float) -> list[tuple[Place, Scale]]:
    """What later layers add, over `ratio`."""
    scale = Scale(1 / torch.tensor(ratio, dtype=torch.float64))
    targets = (model.architecture.attention_output, model.architecture.down_projection)
    later = range(layer + 1, len(model.layers))
    return [(Place(index, target), scale) for index in later for target in targets]


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
