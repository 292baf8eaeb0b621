"""Ours: the damage without a layer after it was repaired, so that what a repair can mend does not
count.

For each layer, or pair of sublayers, the last linear map of the sublayer before it is fitted (W',
in closed form, see gradmap.methods.ridge) to give what followed it in the dense model, and it is
measured how far the next-token distributions are from the dense model's. The best removal is kept
together with its repair. Samples to fit on and samples to measure on are different ones.

Not the loss is measured, which asks for the one token that follows in the text: that depends far
more on chance, and a fit to texts of one kind lowers it on such texts and raises it on others.

Where an RMS norm follows the map (Gemma 2 and 3), its gain is fitted too. Where W' cannot be fitted
(all experts of a layer in one tensor), the removal itself is measured, on all samples, for none is
fitted on.

Not everything is computed. Removals make others dearer, or a little cheaper, so that trying stops
where the costs of the round before are far enough above the best (the lazy greedy algorithm, Minoux
1978, with a margin). A layer that is clearly worse than the best is given up after a few samples
(gradmap.methods.racing). And what the layers before a removal compute stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradmap.common.distributed import summed
from gradmap.common.finite import require_finite, require_finite_losses
from gradmap.common.processes import process_count, process_rank
from gradmap.costs.steps import selection_flops
from gradmap.costs.timing import in_rounds
from gradmap.methods.base import Selector
from gradmap.methods.racing import Race, laps
from gradmap.methods.selection import Selection, Subject
from gradmap.methods.trial_repairs import (
    LinearRepair,
    NormedMap,
    Repair,
    States,
    fit_normed_repair,
    fit_repair,
)
from gradmap.model.batching import Batches, forward_batch, home_for, moved_home
from gradmap.model.corrections import Changes, Gain, followed_by, linear_output
from gradmap.model.layered import Advance
from gradmap.model.layerwise import (
    LayerCalls,
    capturing,
    divergences_from,
    record_layer_calls,
    stacked_on_cpu,
)
from gradmap.model.sublayers import PIECES, Pair, Sublayer, pieces

# Of the samples to fit on, and of those that are held out. Their hidden states between all layers
# are kept.
FIT_TOKENS = 6144
MEASURE_TOKENS = 4096
# What is kept of every sample, in hidden states: what enters and is added by each piece (a layer,
# or a sublayer), in the dense model, in the present one, and in the one that is tried.
STATES_PER_PIECE = 6


@dataclass(frozen=True)
class Trial:
    """A pair left out, with its repair. divergences: (m,) float64, nats per token of the samples it
    was measured on. behind: their states in the pieces behind it."""

    pair: Pair
    repair: Repair
    divergences: Tensor
    behind: States


class RepairScorer:
    """The divergence that a removal adds after its repair, nats per token. The first layer has
    nothing before it, and stays.

    Of several processes, each tries another candidate.
    """

    @torch.no_grad()
    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._removed: tuple[Pair, ...] = ()
        model, calibration = subject.model, subject.calibration
        tokens = calibration.input_ids.shape[1]
        fit_ids = calibration.fit_ids[: max(1, FIT_TOKENS // tokens) if self._repairable else 1].to(
            model.device
        )
        unseen = calibration.held_out_ids if self._repairable else calibration.input_ids
        self._measure_ids = unseen[: max(1, MEASURE_TOKENS // tokens)].to(model.device)
        states = STATES_PER_PIECE * len(self._pieces)
        kept = states * (len(fit_ids) + len(self._measure_ids)) * tokens
        self._home = home_for(model.network, kept)
        self._batches = Batches(forward_batch(fit_ids, model.device))
        self._calls = LayerCalls(model, fit_ids)
        self._changes: Changes = {}
        self._fitted, self._measured = (
            self._run(record_layer_calls(model, ids)[0]) for ids in (fit_ids, self._measure_ids)
        )
        # what follows each piece in the dense model, by its last sublayer
        ends = [piece[-1] for piece in self._pieces]
        self._wanted = dict(zip(ends, self._fitted.entering[1:], strict=True))
        self._wanted_at_last = self._measured.entering[-1]
        self._divergences = self._divergences_of(self._measured, slice(None))
        first = len(calibration.fit_ids) if self._repairable else 0
        require_finite_losses(self._divergences, range(first, first + len(self._divergences)))
        self._leader: Trial | None = None  # of the round, if it was tried in this process

    def work(self, alive: int) -> int:
        return alive * self._width

    @torch.no_grad()
    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        for pair in so_far.removal_order[len(self._removed) :]:
            self._adopt(pair)
        candidates = [
            pair
            for pair in self._subject.candidates(self._removed)[1:]
            if not pair.is_in(self._subject.protected)
        ]
        scores = so_far.steps[-1].scores if so_far.steps else {}
        before = {pair: scores.get(pair, -math.inf) for pair in candidates}
        untried = sorted(candidates, key=(before if scores else self._influences()).__getitem__)
        race, left = Race(len(self._measure_ids)), len(self._pieces)

        def measure(group: Sequence[Pair]) -> list[Tensor]:
            nonlocal left
            tried = self._try_each(group, race)
            for pair, divergences in zip(group, tried, strict=True):
                require_finite(f"What removing {pair.words} costs", divergences)
            advance(len(group))
            left -= len(group)
            return tried

        base = self._divergences.mean().item()
        costs = race.run(untried, before, base, measure, at_once=process_count())
        advance(left)
        return costs

    @property
    def _width(self) -> int:
        """How many pieces go at a time."""
        return PIECES[self._subject.unit]

    @property
    def _pieces(self) -> list[Sequence[Sublayer]]:
        """Those that are left."""
        return pieces(self._subject.left(self._removed), self._subject.unit)

    def _place_of(self, pair: Pair) -> int:
        """Where it begins among the pieces."""
        return [piece[0] for piece in self._pieces].index(pair.first)

    @property
    def _repairable(self) -> bool:
        return self._subject.model.architecture.is_fitted

    def _influences(self) -> dict[Pair, float]:
        """How much each candidate turns the hidden state. One that is easy to miss goes first, for
        all others are held against it."""
        entering = self._measured.entering
        cosines = [
            cosine_similarity(before, behind.to(before.device), dim=-1).mean()
            for before, behind in zip(entering, entering[self._width :], strict=False)
        ]
        influences = (1 - stacked_on_cpu(cosines).double()).tolist()
        return dict(zip(self._subject.candidates(self._removed), influences, strict=True))

    def _try_each(self, group: Sequence[Pair], race: Race) -> list[Tensor]:
        """The divergences of each candidate (m,), float64; m differs. Each process tries one."""
        known = torch.zeros(len(group), len(self._measure_ids) + 1, dtype=torch.float64)
        if process_rank() < len(group):
            own = self._try(group[process_rank()], race)
            known[process_rank(), : len(own.divergences)] = own.divergences
            known[process_rank(), -1] = len(own.divergences)
            if not race.is_behind(own.divergences):
                self._leader = own
        return [row[: int(row[-1])] for row in summed(known)]

    def _try(self, pair: Pair, race: Race) -> Trial:
        """Measures lap after lap until the candidate is lost, or all samples were measured."""
        place, repair = self._place_of(pair), self._fit(pair)
        laps_behind: list[States] = []
        divergences = torch.zeros(0, dtype=torch.float64)
        for samples in laps(len(self._measure_ids), self._batches.size):
            leaving = repair.leaving(*self._measured.before(place, samples, self._device))
            laps_behind.append(self._run(leaving, place + self._width))
            divergences = torch.cat([divergences, self._divergences_of(laps_behind[-1], samples)])
            if race.is_lost(divergences):
                break
        return Trial(pair, repair, divergences, States.joined(laps_behind))

    def _adopt(self, pair: Pair) -> None:
        """Removes it; the repair stays."""
        trial, self._leader = self._leader, None
        # decided by another process, or by a run that was interrupted
        if trial is None or trial.pair != pair:
            trial = self._try(pair, Race(len(self._measure_ids)))
        place, model = self._place_of(pair), self._subject.model
        leaving = trial.repair.leaving(*self._fitted.before(place, slice(None), self._device))
        behind = self._run(leaving, place + self._width)
        self._fitted = self._fitted.without(place, trial.repair, behind)
        self._measured = self._measured.without(place, trial.repair, trial.behind)
        self._divergences = trial.divergences
        if self._repairable:
            self._changes = followed_by(self._changes, trial.repair.changes)
        sublayer_of = model.architecture.sublayer_of
        self._changes = {
            place: made for place, made in self._changes.items() if sublayer_of(*place) not in pair
        }
        self._removed += (pair,)

    def _fit(self, pair: Pair) -> Repair:
        """Of the last map before it; one that changes nothing where that cannot be fitted."""
        model, wanted = self._subject.model, self._wanted[pair.second]
        place = self._place_of(pair)
        before = self._pieces[place - 1][-1]
        output = model.output_of(before)
        if not self._repairable:
            width = wanted.shape[-1]
            return LinearRepair(output, torch.zeros(width, width, dtype=torch.float64))
        given, added = self._fitted.before(place, slice(None), self._device)
        wanted = wanted.to(self._device, non_blocking=True)
        norm = model.norm_behind(before)
        if norm is None:
            return fit_repair(output, given, added, wanted)
        factor = torch.ones(wanted.shape[-1], dtype=torch.float64, device=self._device)
        for change in self._changes.get(norm.place, ()):
            assert isinstance(change, Gain)
            factor = factor * change.factor
        return fit_normed_repair(NormedMap(model, output, norm, factor), given, added, wanted)

    @property
    def _device(self) -> torch.device:
        return self._subject.model.device

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
        """Through the pieces that are left from `place` on, with the repairs so far.

        hidden: what enters the first of them, (n, T, d).
        """
        states = States([moved_home(hidden, self._home)], [])
        with self._subject.model.changed(self._changes):
            for piece in self._pieces[place:]:
                hidden, added = self._run_piece(piece, hidden)
                states.entering.append(moved_home(hidden, self._home))
                states.added.append(moved_home(added, self._home))
        return states

    def _run_piece(self, piece: Sequence[Sublayer], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves a piece, and what its last linear map adds to the hidden state, bias aside,
        (n, T, d) both; in batches."""
        model = self._subject.model
        output_map = model.map_at(model.output_of(piece[-1]))
        multiplier = model.multiplier(piece[-1])
        module = model.of_sublayers(piece)
        parts: list[tuple[Tensor, Tensor]] = []

        def run_batch(samples: slice) -> None:
            entering = hidden[samples]
            call = self._calls.of(piece[0].layer, len(entering))
            leaving = call.run(module, entering)
            added = linear_output(output_map, captured[output_map][1]).reshape(leaving.shape)
            parts.append((leaving, multiplier * added))

        with capturing([output_map]) as captured:
            self._batches.run(len(hidden), run_batch)
        leaving, added = map(torch.cat, zip(*parts, strict=True))
        return leaving, added


SELECTOR = Selector(
    name="repair",
    about="the layer whose removal, repaired, takes the model least far from the dense one",
    make=RepairScorer,
    in_memory=True,
    by_held_out=True,
    score_label="divergence that removal adds after repair (nats per token)",
    round_takes="a closed-form fit and a part of a forward pass for each one that is tried",
    seconds=in_rounds(selection_flops, of_each=True),
)
