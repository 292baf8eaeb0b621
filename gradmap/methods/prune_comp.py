"""Prune&Comp (arXiv 2507.18212): later layers expect a hidden state as large as the removed layer
would have left it.

With alpha, the factor by which a layer makes the hidden state larger, the paper multiplies the
embeddings and what earlier layers add by alpha. Layers normalise what they read, so it comes to the
same to divide what later layers add by alpha: then all of the hidden state is smaller by alpha,
which the final norm takes out. That needs no change of the embeddings, which may be tied to the
head, and is as exact: but for the epsilon of the norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmap.common.console import progress
from gradmap.common.distributed import share_of, summed
from gradmap.methods.compensation import Compensation, Pruned, run_and_capture
from gradmap.model.architectures import Architecture
from gradmap.model.corrections import (
    Change,
    Changes,
    Place,
    Scale,
    followed_by,
    pruned_and_corrected,
)


def scale_after_removals(pruned: Pruned) -> Compensation:
    """One alpha for every removed layer, in the order of removal, each measured with those before
    it in place."""
    model, architecture = pruned.model, pruned.architecture
    changes: Changes = {}
    with progress("Measuring magnitudes (layers)", len(pruned.removed)) as advance:
        for position, layer in enumerate(pruned.removed):
            ids, gone = pruned.calibration.fit_ids, pruned.removed[:position]
            ratio = magnitude_ratio(
                model, architecture, ids, layer, gone, changes, pruned.batches.size
            )
            changes = followed_by(changes, scales_behind(architecture, model, layer, ratio))
            advance(1)
    pairs = [
        (place, _product(scales)) for place, scales in changes.items() if place.layer in pruned.kept
    ]
    return Compensation(pruned.judge(pairs, {}))


def magnitude_ratio(
    model: Any,
    architecture: Architecture,
    input_ids: Tensor,
    layer: int,
    gone: Sequence[int],
    changes: Changes,
    batch_size: int,
) -> float:
    """alpha: mean |output| / mean |input| of a layer, over the positions of a sample for each
    channel, then averaged over samples and channels. In the model without the layers that are
    `gone`, with `changes`. input_ids: (N, T)."""
    layers = architecture.layer_list(model)
    behind = {*gone, *range(layer + 1, len(layers))}
    total = torch.zeros((), dtype=torch.float64)
    with pruned_and_corrected(model, architecture, sorted(behind), changes):
        for batch in share_of(input_ids)[0].split(batch_size):
            ((entering, leaving),) = run_and_capture(model, [layers[layer]], batch)
            ratios = leaving.double().abs().mean(dim=1) / entering.double().abs().mean(dim=1)
            total = total + ratios.mean(dim=1).sum().cpu()
    return summed(total).item() / len(input_ids)


def scales_behind(
    architecture: Architecture, model: Any, layer: int, ratio: float
) -> list[tuple[Place, Scale]]:
    """What later layers add, over `ratio`."""
    scale = Scale(1 / torch.tensor(ratio, dtype=torch.float64))
    targets = (architecture.attention_output, architecture.down_projection)
    later = range(layer + 1, len(architecture.layer_list(model)))
    return [(Place(index, target), scale) for index in later for target in targets]


def _product(scales: Sequence[Change]) -> Scale:
    factor = torch.ones((), dtype=torch.float64)
    for scale in scales:
        factor = scale.fold(factor)
    return Scale(factor)
