"""LaCo (Yang et al. 2024, arXiv 2402.11187): layers collapse into the one before them, weight by
weight, as long as the model's last hidden state stays alike.

A walk from the last layers to the first tries to merge a few at a time. How alike the hidden state
has to stay is set by hand in the paper, for each model and ratio; here the threshold begins high
and falls, a walk at a time, until as many layers went as were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradmap.common.distributed import summed
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite
from gradmap.costs.timing import no_seconds
from gradmap.methods.base import Compensator, Job, Selector
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.merging import NO_EXPERTS, WHOLE_LAYERS, Merge, merge_runs, merged_weights
from gradmap.methods.selection import FixedOrder, Subject
from gradmap.model.batching import Batches
from gradmap.model.corrections import Changes, Place, gather_changes, weight_of
from gradmap.model.layered import LayeredModel
from gradmap.model.sublayers import Pair

# C, L and I of the paper's Algorithm 1: how many layers become one at a time, the first layer that
# others are merged into, and how many layers the walk goes on after a merger.
COMBINED, LOWEST, INTERVAL = 4, 1, 2
THRESHOLDS = tuple(tenths / 10 for tenths in range(9, -11, -1))
SAMPLES = 10  # as many sentences as the paper compares hidden states of

# How alike the last hidden state is without these layers, merged into those that stay: -1 to 1.
Similarity = Callable[[tuple[Pair, ...]], float]


def walk_from_the_end(subject: Subject) -> FixedOrder:
    """The order in which layers are merged, until as many went as are asked for or no more can."""
    similarity = similarity_of(subject)
    removed: tuple[Pair, ...] = ()
    for threshold in THRESHOLDS:
        removed = walk(subject, removed, similarity, threshold)
    return FixedOrder(removed)


def walk(
    subject: Subject, removed: Sequence[Pair], similarity: Similarity, threshold: float
) -> tuple[Pair, ...]:
    """One walk of the paper's Algorithm 1: what was removed, and what it merges besides."""
    removed = tuple(removed)
    behind = mergeable(subject, removed)
    place = highest(behind)
    while place >= LOWEST and len(removed) < subject.count:
        if behind[place] and similarity((*removed, *behind[place])) > threshold:
            removed = (*removed, *behind[place])
            behind = mergeable(subject, removed)
            place = min(place - INTERVAL, highest(behind))
        else:
            place -= 1
    return removed


def mergeable(subject: Subject, removed: Sequence[Pair]) -> list[tuple[Pair, ...]]:
    """What can be merged into each layer that is left: those that follow it, up to a protected
    one."""
    kept = subject.candidates(removed)
    following = [kept[place : place + COMBINED - 1] for place in range(1, len(kept) + 1)]
    return [
        tuple(takewhile(lambda pair: not pair.is_in(subject.protected), pairs))
        for pairs in following
    ]


def highest(behind: Sequence[Sequence[Pair]]) -> int:
    """The last place that as many can be merged into as into any: in the paper, H - C."""
    places = range(LOWEST, len(behind))
    return max(places, key=lambda place: (len(behind[place]), place), default=0)


def collapse_runs(pruned: Pruned) -> Compensation:
    """RDSC, the paper's Eq. 1: W <- W + the sum of W_removed - W over each run."""
    return merge_runs(pruned, adding_differences(pruned.model))


def adding_differences(model: LayeredModel) -> Merge:
    """Adds what a removed layer's weight has more than the retained one's."""

    def merge(weight: Tensor, removed: Tensor, kept: Place, source: Place) -> Tensor:
        return weight + removed - weight_of(model.map_at(kept))

    return merge


def collapsed(subject: Subject, removed: Sequence[Pair]) -> Changes:
    """What the layers that stay become when these are merged into them."""
    pruned = Pruned(subject.model, subject.calibration, tuple(removed), Batches(1))
    merge = adding_differences(subject.model)
    merged = [merged_weights(pruned, merge, run) for run in pruned.runs()]
    return gather_changes([pair for of_run in merged for pair in of_run])


def require_no_experts(job: Job, options: None) -> None:
    """Raises UserError for a mixture of experts."""
    if job.architecture.expert_down_projections is not None:
        raise UserError(f"{NO_EXPERTS}; use --selector repair or block-influence.")


def similarity_of(subject: Subject) -> Similarity:
    """Of the last hidden states of a sample, its tokens in a row; the mean over a few samples."""
    model, input_ids = subject.model, subject.calibration.input_ids[:SAMPLES]

    @torch.no_grad()
    def last_hidden_states() -> list[Tensor]:
        """(B, T d) of each batch."""
        base, batches = model.network.base_model, model.batches(input_ids)
        outputs = (base(input_ids=batch, use_cache=False) for batch in batches)
        return [output.last_hidden_state.flatten(start_dim=1).float() for output in outputs]

    dense = last_hidden_states()

    @cache  # walks with a lower threshold come to the same mergers again
    def similarity(removed: tuple[Pair, ...]) -> float:
        with model.changed(collapsed(subject, removed), without=removed):
            given = last_hidden_states()
        pairs = zip(dense, given, strict=True)
        cosines = torch.cat([cosine_similarity(*pair, dim=1) for pair in pairs])
        mean = summed(cosines.double().sum().cpu()).item() / len(input_ids)
        require_finite("The last hidden state of merged layers", mean)
        return mean

    return similarity


PAPER = "LaCo (arXiv 2402.11187)"
SELECTOR = Selector(
    name="laco",
    about="the last layers that can be merged into the one before them",
    paper=PAPER,
    make=walk_from_the_end,
    in_memory=True,
    whole_layers=WHOLE_LAYERS,
    check=require_no_experts,
    score_label="place in the walk from the end",
    round_takes="nothing; one forward pass for each merger that is tried, once",
)
COMPENSATOR = Compensator(
    name="laco",
    about="adds to a layer how the removed ones behind it differ from it",
    paper=PAPER,
    run=collapse_runs,
    in_memory=True,
    whole_layers=WHOLE_LAYERS,
    no_experts=NO_EXPERTS,
    seconds=no_seconds,
)
