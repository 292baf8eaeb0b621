"""Stage 2: what pruning broke is repaired in the weights that stay. How it is
repaired is a compensator's business (gradmap.methods.base).

Every correction is judged on calibration samples that it was not fitted on, by how far the
next-token distributions are from the dense model's; one that does not bring them nearer is left
out, unless all are to be applied, as the papers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gradmap.common.finite import require_finite
from gradmap.data.calibration import Calibration
from gradmap.model.batching import Batches
from gradmap.model.corrections import (
    HIDDEN_STATE,
    Change,
    Changes,
    Place,
    followed_by,
    gather_changes,
)
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import capturing
from gradmap.model.sublayers import (
    JoinedLayer,
    Pair,
    Sublayer,
    joined_layers,
    sublayers_left,
    sublayers_of,
)
from gradmap.model.walk import Walk


@dataclass(frozen=True)
class Correction:
    """A change of one weight, and what it did on held-out samples.

    lam: the regularisation it was fitted with (Eq. 12), and relative_lambda the same over the mean
    diagonal of the Gram matrix; None if it was not fitted in closed form. divergences: of the
    next-token distributions from the dense model's, KL(dense || pruned), the mean over the held-out
    samples, nats per token; corrections that were fitted together have the same. None if no samples
    are held out. accepted: a correction that is not must not be applied.
    """

    place: Place
    change: Change
    held_out_divergence_before: float | None
    held_out_divergence_after: float | None
    accepted: bool
    lam: float | None = None
    relative_lambda: float | None = None

    def require_finite(self) -> None:
        """Raises UserError unless what was measured of it is finite. Its tensors, which a GPU would
        be waited for, are looked at when they are written (gradmap.pruning.plan)."""
        target = "hidden state" if self.place.target == HIDDEN_STATE else self.place.target
        divergences = self.held_out_divergence_before, self.held_out_divergence_after
        require_finite(
            f"The held-out divergence of the correction of layer {self.place.layer} ({target})",
            *(*divergences, self.lam, self.relative_lambda),
        )


@dataclass(frozen=True)
class Compensation:
    """The outcome of stage 2: the drift of every retained layer (Eq. 8, by original index) and the
    corrections."""

    corrections: tuple[Correction, ...] = ()
    drift: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UserError if something in it is not finite."""
        for layer, drift in self.drift.items():
            require_finite(f"The drift of layer {layer}", drift)
        for correction in self.corrections:
            correction.require_finite()

    @property
    def held_out_divergence(self) -> float | None:
        """With those that are accepted, nats per token; None if nothing was measured."""
        if not self.corrections:
            return None
        last = self.corrections[-1]
        return last.held_out_divergence_after if last.accepted else last.held_out_divergence_before

    @property
    def changes(self) -> Changes:
        """The changes that are accepted."""
        accepted = [correction for correction in self.corrections if correction.accepted]
        return gather_changes([(made.place, made.change) for made in accepted])


class Run(NamedTuple):
    """Removed sublayers that follow each other. before: the retained one before them, whose output
    map can make up for them. last: the last of them."""

    before: Sublayer
    last: Sublayer


@dataclass(frozen=True)
class Pruned:
    """What a compensator repairs: `model`, which is whole, without what was `removed`, and the
    samples to do it on.

    removed: in the order of removal. batches: of samples in a forward pass. accept_all: whether
    corrections are applied whatever they do to the held-out divergence.
    """

    model: LayeredModel
    calibration: Calibration
    removed: tuple[Pair, ...]
    batches: Batches
    accept_all: bool = False

    @property
    def sublayers(self) -> list[Sublayer]:
        return sublayers_of(range(len(self.model.layers)))

    @property
    def kept(self) -> list[Sublayer]:
        return sublayers_left(len(self.model.layers), self.removed)

    @property
    def kept_layers(self) -> list[JoinedLayer]:
        return joined_layers(len(self.model.layers), self.removed)

    def runs(self) -> list[Run]:
        """The runs of removed sublayers, front to back.

        One at the very beginning has nothing before it that stays, and is left out.
        """
        kept = set(self.kept)
        found: list[Run] = []
        before: Sublayer | None = None
        for sublayer, following in zip_longest(self.sublayers, self.sublayers[1:]):
            if sublayer in kept:
                before = sublayer
            elif before is not None and (following is None or following in kept):
                found.append(Run(before, sublayer))
        return found

    def judge(
        self, pairs: Sequence[tuple[Place, Change]], changes: Changes, before: float | None = None
    ) -> tuple[Correction, ...]:
        """Changes that belong together as corrections, on top of `changes`. before: without them,
        if known."""
        before = self.divergence(changes) if before is None else before
        after = self.divergence(followed_by(changes, pairs))
        return tuple(
            Correction(place, change, before, after, self.accepts(before, after))
            for place, change in pairs
        )

    def accepts(self, before: float | None, after: float | None) -> bool:
        """Whether a correction is applied that changes the held-out divergence so."""
        if self.accept_all:
            return True
        assert before is not None and after is not None, (
            "check_settings sees to it that samples are held out"
        )
        return after < before

    def walk(self, sublayers: Sequence[Sublayer], input_ids: Tensor) -> Walk:
        """Samples (N, T) before they pass these of the model's sublayers."""
        return Walk(self.model, sublayers, input_ids, self.batches)

    @cached_property
    def wanted(self) -> Tensor:
        """What the dense model's last layer gives for this process's share of the held-out samples,
        (n, T, d)."""
        return self.walk(self.sublayers, self.calibration.held_out_ids).finish({})

    def divergence(self, changes: Changes) -> float | None:
        """On the held-out samples, nats per token; None if there are none."""
        if not self.calibration.held_out_samples:
            return None
        return self.walk(self.kept, self.calibration.held_out_ids).divergence(self.wanted, changes)


Item = TypeVar("Item")


def correct_in_turn(
    items: Iterable[Item], correct: Callable[[Item, Changes], Sequence[Correction]]
) -> tuple[Correction, ...]:
    """The corrections for one item after the other; each sees those before it that were
    accepted."""
    corrections: tuple[Correction, ...] = ()
    for item in items:
        corrections += tuple(correct(item, Compensation(corrections).changes))
    return corrections


@torch.no_grad()
def run_and_capture(
    model: LayeredModel, modules: Sequence[nn.Module], input_ids: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Runs one batch (B, T) and returns what enters and leaves each module: (B, T, ...), or (B*T,
    ...) where a family flattens."""
    with capturing(modules) as captured:
        # logits are not needed
        model.network.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    return [captured[module] for module in modules]
