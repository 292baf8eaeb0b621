"""Ours: the damage without a layer after it was repaired, so that what a repair can mend does not
count.

For each layer, the retained layer before it is fitted (W', in closed form, see
gradmap.methods.ridge) to give what the layer gave in the dense model, and it is measured
behind it how far the next-token distributions are from the dense model's. The best removal is kept
together with its repair. Samples to fit on and samples to measure on are different ones.

Not the loss is measured, which asks for the one token that follows in the text: that depends far
more on chance, and a fit to texts of one kind lowers it on such texts and raises it on others.

Where a norm follows the down projection (Gemma 2 and 3), there is no such repair. The removal
itself is measured, on all samples, for none is fitted on.

Not everything is computed. Removals make others dearer, or a little cheaper, so that trying stops
where the costs of the round before are far enough above the best (the lazy greedy algorithm, Minoux
1978, with a margin). A layer that is clearly worse than the best is given up after a few samples
(gradmap.methods.racing). And what the layers before a removal compute stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradmap.common.distributed import summed
from gradmap.common.finite import require_finite, require_finite_losses
from gradmap.common.processes import process_count, process_rank
from gradmap.costs.steps import selection_flops
from gradmap.costs.timing import in_rounds
from gradmap.methods.base import Selector
from gradmap.methods.least_squares import plus_identity, ridge_sums, solve_ridge
from gradmap.methods.racing import Race, laps
from gradmap.methods.selection import Selection, Subject
from gradmap.model.batching import Batches, forward_batch, home_for, moved_home
from gradmap.model.corrections import Change, Place, Projection, linear_output
from gradmap.model.layered import Advance
from gradmap.model.layerwise import capturing, divergences_from, record_layer_calls, stacked_on_cpu
from gradmap.model.precision import widened

# Of the samples to fit on, and of those that are held out. Their hidden states between all layers
# are kept.
FIT_TOKENS = 6144
MEASURE_TOKENS = 4096
RELATIVE_LAMBDA = 0.1
# What is kept of every sample, in hidden states: what enters and is added by each layer, in the
# dense model, in the present one, and in the one that is tried.
STATES_PER_LAYER = 6


@dataclass(frozen=True)
class States:
    """What some samples are in layers that follow each other: what enters each layer and leaves the
    last, (n, T, d) each, and what each down projection adds, likewise."""

    entering: list[Tensor]
    added: list[Tensor]

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        """The states of the samples of all parts."""
        return cls(
            _joined([part.entering for part in parts]), _joined([part.added for part in parts])
        )

    def before(self, place: int, samples: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """What enters the layer at `place`, and what the down projection before it adds, of some
        samples."""
        entering, added = self.entering[place][samples], self.added[place - 1][samples]
        return entering.to(device, non_blocking=True), added.to(device, non_blocking=True)

    def without(self, place: int, repair: Tensor, behind: States) -> States:
        """The states once the layer at `place` is gone, and the one before it is repaired (see
        `repaired`).

        behind: the states of the layers behind it, beginning with what enters them.
        """
        added = self.added[place - 1]
        after_repair = repaired(added, added, repair.to(added.device))
        return States(
            [*self.entering[:place], *behind.entering],
            [*self.added[: place - 1], after_repair, *behind.added],
        )


def _joined(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    """Of lists of (n, T, d), one for each part, the list of (N, T, d)."""
    return [torch.cat(of_place) for of_place in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Trial:
    """A layer left out. repair: S (d, d) float64. divergences: (m,) float64, nats per token of the
    samples it was measured on. behind: their states in the layers behind it."""

    layer: int
    repair: Tensor
    divergences: Tensor
    behind: States


class RepairScorer:
    """The divergence that a removal adds after its repair, nats per token. The first layer has none
    before it, and stays.

    Of several processes, each tries another layer.
    """

    @torch.no_grad()
    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._layers = list(subject.model.layers)
        model, calibration = subject.model, subject.calibration
        tokens = calibration.input_ids.shape[1]
        fit_ids = calibration.fit_ids[: max(1, FIT_TOKENS // tokens) if self._repairable else 1].to(
            model.device
        )
        unseen = calibration.held_out_ids if self._repairable else calibration.input_ids
        self._measure_ids = unseen[: max(1, MEASURE_TOKENS // tokens)].to(model.device)
        kept = (
            STATES_PER_LAYER * (len(fit_ids) + len(self._measure_ids)) * tokens * len(self._layers)
        )
        self._home = home_for(model.network, kept)
        self._batches = Batches(forward_batch(fit_ids, model.device))
        _, self._calls = record_layer_calls(model, fit_ids[:1])  # the same for every sample
        self._removed: tuple[int, ...] = ()
        self._changes: dict[Place, tuple[Change, ...]] = {}
        self._fitted, self._measured = (
            self._run(record_layer_calls(model, ids)[0]) for ids in (fit_ids, self._measure_ids)
        )
        self._wanted = self._fitted.entering[1:]  # what each layer gives in the dense model
        self._wanted_at_last = self._measured.entering[-1]
        self._divergences = self._divergences_of(self._measured, slice(None))
        first = len(calibration.fit_ids) if self._repairable else 0
        require_finite_losses(self._divergences, range(first, first + len(self._divergences)))
        self._leader: Trial | None = None  # of the round, if it was tried in this process

    def work(self, alive: int) -> int:
        return alive

    @torch.no_grad()
    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        for layer in so_far.removal_order[len(self._removed) :]:
            self._adopt(layer)
        candidates = [layer for layer in self._alive[1:] if layer not in self._subject.protected]
        scores = so_far.steps[-1].scores if so_far.steps else {}
        before = {layer: scores.get(layer, -math.inf) for layer in candidates}
        untried = sorted(candidates, key=(before if scores else self._influences()).__getitem__)
        race, left = Race(len(self._measure_ids)), len(self._alive)

        def measure(group: Sequence[int]) -> list[Tensor]:
            nonlocal left
            tried = self._try_each(group, race)
            for layer, divergences in zip(group, tried, strict=True):
                require_finite(f"What removing layer {layer} costs", divergences)
            advance(len(group))
            left -= len(group)
            return tried

        base = self._divergences.mean().item()
        costs = race.run(untried, before, base, measure, at_once=process_count())
        advance(left)
        return costs

    @property
    def _alive(self) -> list[int]:
        return self._subject.alive(self._removed)

    @property
    def _repairable(self) -> bool:
        return self._subject.model.architecture.uncorrectable is None

    def _influences(self) -> dict[int, float]:
        """How much each layer turns the hidden state. A layer that is easy to miss goes first, for
        all others are held against it."""
        cosines = [
            cosine_similarity(entering, leaving.to(entering.device), dim=-1).mean()
            for entering, leaving in pairwise(self._measured.entering)
        ]
        return dict(zip(self._alive, (1 - stacked_on_cpu(cosines).double()).tolist(), strict=True))

    def _try_each(self, group: Sequence[int], race: Race) -> list[Tensor]:
        """The divergences of each layer (m,), float64; m differs. Each process tries one."""
        known = torch.zeros(len(group), len(self._measure_ids) + 1, dtype=torch.float64)
        if process_rank() < len(group):
            own = self._try(group[process_rank()], race)
            known[process_rank(), : len(own.divergences)] = own.divergences
            known[process_rank(), -1] = len(own.divergences)
            if not race.is_behind(own.divergences):
                self._leader = own
        return [row[: int(row[-1])] for row in summed(known)]

    def _try(self, layer: int, race: Race) -> Trial:
        """Measures lap after lap until the layer is lost, or all samples were measured."""
        place, repair = self._alive.index(layer), self._fit(layer)
        laps_behind: list[States] = []
        divergences = torch.zeros(0, dtype=torch.float64)
        for samples in laps(len(self._measure_ids), self._batches.size):
            leaving = repaired(*self._measured.before(place, samples, repair.device), repair)
            laps_behind.append(self._run(leaving, place + 1))
            divergences = torch.cat([divergences, self._divergences_of(laps_behind[-1], samples)])
            if race.is_lost(divergences):
                break
        return Trial(layer, repair, divergences, States.joined(laps_behind))

    def _adopt(self, layer: int) -> None:
        """Removes the layer; the repair stays."""
        trial, self._leader = self._leader, None
        # decided by another process, or by a run that was interrupted
        if trial is None or trial.layer != layer:
            trial = self._try(layer, Race(len(self._measure_ids)))
        place = self._alive.index(layer)
        before = Place(self._alive[place - 1], self._subject.model.architecture.down_projection)
        leaving = repaired(
            *self._fitted.before(place, slice(None), trial.repair.device), trial.repair
        )
        behind = self._run(leaving, place + 1)
        self._fitted = self._fitted.without(place, trial.repair, behind)
        self._measured = self._measured.without(place, trial.repair, trial.behind)
        self._divergences = trial.divergences
        if self._repairable:
            self._changes[before] = (
                *self._changes.get(before, ()),
                Projection(plus_identity(trial.repair)),
            )
        self._changes.pop(Place(layer, before.target), None)
        self._removed += (layer,)

    def _fit(self, layer: int) -> Tensor:
        """S (d, d) float64: what to add to the output of the layer before, as a map of what its FFN
        adds; nothing where that is no linear map any more."""
        device = self._subject.model.device
        if not self._repairable:
            width = self._wanted[layer].shape[-1]
            return torch.zeros(width, width, dtype=torch.float64, device=device)
        given, added = self._fitted.before(self._alive.index(layer), slice(None), device)
        wanted = self._wanted[layer].to(device, non_blocking=True)
        gram, cross = ridge_sums(added, widened(wanted) - widened(given), wanted)
        return solve_ridge(gram, cross, RELATIVE_LAMBDA * gram.diagonal().mean())

    def _divergences_of(self, states: States, samples: slice) -> Tensor:
        """The divergence of each of these samples to measure on, (n,) float64, nats per token,
        given what leaves the last layer."""
        model, input_ids = self._subject.model, self._measure_ids[samples]
        hidden = states.entering[-1].to(model.device, non_blocking=True)
        wanted = self._wanted_at_last[samples].to(model.device, non_blocking=True)
        divergences = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)

        def run_batch(batch: slice) -> None:
            states = hidden[batch], wanted[batch]
            divergences[batch] = divergences_from(model, *states, input_ids[batch]).double()

        self._batches.run(len(hidden), run_batch)
        return divergences.cpu() / input_ids.shape[1]

    def _run(self, hidden: Tensor, place: int = 0) -> States:
        """Through the layers that are left from `place` on, with the repairs so far.

        hidden: what enters the first of them, (n, T, d).
        """
        states = States([moved_home(hidden, self._home)], [])
        with self._subject.model.changed(self._changes):
            for index in self._alive[place:]:
                hidden, added = self._run_layer(index, hidden)
                states.entering.append(moved_home(hidden, self._home))
                states.added.append(moved_home(added, self._home))
        return states

    def _run_layer(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves a layer, and what its down projection adds to it, bias aside, (n, T, d) both;
        in batches."""
        projection = self._subject.model.down_projection(index)
        parts: list[tuple[Tensor, Tensor]] = []

        def run_batch(samples: slice) -> None:
            leaving = self._calls[index].run(self._layers[index], hidden[samples])
            added = linear_output(projection, captured[projection][1]).reshape(leaving.shape)
            parts.append((leaving, added))

        with capturing([projection]) as captured:
            self._batches.run(len(hidden), run_batch)
        leaving, added = map(torch.cat, zip(*parts, strict=True))
        return leaving, added


def repaired(given: Tensor, added: Tensor, repair: Tensor) -> Tensor:
    """H + S A: what H, (n, T, d), becomes with S (d, d) in front of the down projection that added
    A, (n, T, d)."""
    return given + added @ repair.to(added).mT


SELECTOR = Selector(
    name="repair",
    about="the layer whose removal, repaired, takes the model least far from the dense one",
    make=RepairScorer,
    in_memory=True,
    by_held_out=True,
    score_label="divergence that removal adds after repair (nats per token)",
    round_takes="a closed-form fit and a part of a forward pass for each layer that is tried",
    seconds=in_rounds(selection_flops),
)
