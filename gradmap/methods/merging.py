"""Removed layers live on in the weights of the retained layer before them, as in MKA, GradPruner
and LaCo."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gradmap.methods.compensation import Compensation, Correction, Pruned, Run, correct_in_turn
from gradmap.model.corrections import Change, Changes, Place, Update, weight_of
from gradmap.model.sublayers import sublayers_of

WHOLE_LAYERS = "merges layers, so that whole layers must go"
NO_EXPERTS = "The experts of two layers do not correspond, so these cannot be merged"

# (weight of the retained layer so far, weight of a removed one, where each is) -> the merged
# weight; (d_out, d_in)
Merge = Callable[[Tensor, Tensor, Place, Place], Tensor]


def merge_runs(pruned: Pruned, merge: Merge) -> Compensation:
    """Merges each run of removed layers, front to back, into the retained layer before it; norms
    and biases stay."""

    def correct(run: Run, changes: Changes) -> tuple[Correction, ...]:
        return pruned.judge(merged_weights(pruned, merge, run), changes)

    return Compensation(correct_in_turn(pruned.runs(), correct))


def merged_weights(pruned: Pruned, merge: Merge, run: Run) -> list[tuple[Place, Change]]:
    """What becomes of every linear map of the retained layer before a run of removed ones."""
    before, removed = run.before.layer, range(run.before.layer + 1, run.last.layer + 1)
    sources = dict(pruned.model.linear_maps(sublayers_of(removed)))
    pairs: list[tuple[Place, Change]] = []
    for place, module in pruned.model.linear_maps(sublayers_of([before])):
        original = merged = weight_of(module).double()
        for layer in removed:
            source = Place(layer, place.target)
            merged = merge(merged, weight_of(sources[source]).double(), place, source)
        pairs.append((place, Update(merged - original)))
    return pairs
