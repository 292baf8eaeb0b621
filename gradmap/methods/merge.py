"""Removed layers live on in the weights of the retained layer before them, as in MKA (arXiv
2406.16330) and GradPruner (arXiv 2601.19503).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from gradmap.common.errors import UserError
from gradmap.methods.compensation import Compensation, Correction, Pruned, correct_in_turn
from gradmap.methods.gradpruner import weight_importances
from gradmap.methods.mka import layer_similarities
from gradmap.model.corrections import Change, Changes, Place, Update, linear_maps, weight_of

MERGED_SHARE = 0.2  # of a removed layer's weights, in GradPruner

# (weight of the retained layer so far, weight of a removed one, where each is) -> the merged
# weight; (d_out, d_in)
Merge = Callable[[Tensor, Tensor, Place, Place], Tensor]


def merge_by_similarity(pruned: Pruned) -> Compensation:
    """MKA: W <- r W + (1 - r) W_removed with r = sigmoid(s / (s + s_removed)), s a layer's mean
    similarity to all."""
    similarities = layer_similarities(
        pruned.model, pruned.architecture, pruned.calibration.input_ids, pruned.calibration.seed
    )
    means = similarities.mean(axis=1)

    def merge(weight: Tensor, removed: Tensor, kept: Place, source: Place) -> Tensor:
        share = means[kept.layer] / (means[kept.layer] + means[source.layer])
        ratio = 1 / (1 + math.exp(-share))
        return ratio * weight + (1 - ratio) * removed

    return _merge_runs(pruned, merge)


def merge_where_signs_agree(pruned: Pruned) -> Compensation:
    """GradPruner: the most important weights of a removed layer are added where the retained one's
    have their sign."""
    importances = weight_importances(
        pruned.model,
        pruned.architecture,
        pruned.calibration.fit_ids,
        pruned.calibration.seed,
        pruned.removed,
    )

    def merge(weight: Tensor, removed: Tensor, kept: Place, source: Place) -> Tensor:
        importance = importances[source]
        least = (
            importance.flatten().kthvalue(math.ceil((1 - MERGED_SHARE) * importance.numel())).values
        )
        agreed = (importance > least) & (weight.sign() == removed.sign())
        return weight + removed * agreed

    return _merge_runs(pruned, merge)


def _merge_runs(pruned: Pruned, merge: Merge) -> Compensation:
    """Merges each run of removed layers, front to back, into the retained layer before it; norms
    and biases stay."""
    if pruned.architecture.expert_down_projections is not None:
        raise UserError(
            "The experts of two layers do not correspond, so these cannot be merged; use "
            "sequential."
        )

    def correct(run: tuple[int, int], changes: Changes) -> tuple[Correction, ...]:
        return pruned.judge(_merge_run(pruned, merge, *run), changes)

    return Compensation(correct_in_turn(pruned.runs(), correct))


def _merge_run(pruned: Pruned, merge: Merge, before: int, end: int) -> list[tuple[Place, Change]]:
    sources = dict(linear_maps(pruned.architecture, pruned.model, range(before + 1, end + 1)))
    pairs: list[tuple[Place, Change]] = []
    for place, module in linear_maps(pruned.architecture, pruned.model, [before]):
        original = merged = weight_of(module).double()
        for layer in range(before + 1, end + 1):
            source = Place(layer, place.target)
            merged = merge(merged, weight_of(sources[source]).double(), place, source)
        pairs.append((place, Update(merged - original)))
    return pairs
