"""A student of the dense model (gradmap.healing.students), trained to predict what that does on
texts, for as long as a budget says.

The dense model is the same weights in memory, with the removed layers in place and without changes;
what it gives is computed for a few steps at a time, and never stored. Steps are AdamW's (Loshchilov
and Hutter 2017, arXiv 1711.05101) with a warm-up and a cosine to a tenth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradmap.common.console import progress, say
from gradmap.common.distributed import least_of_all, share_of_step, summed
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite
from gradmap.common.processes import is_main_process
from gradmap.data.mixture import Samples
from gradmap.healing.options import HealOptions
from gradmap.healing.sharding import FixedBatches, set_shared_gradients
from gradmap.healing.students import Student
from gradmap.healing.tracking import Track, untracked
from gradmap.methods.compensation import Pruned
from gradmap.methods.distillation import Lessons, set_lesson_gradients
from gradmap.methods.training import set_gradients
from gradmap.model.batching import (
    Batches,
    activation_bytes,
    batch_of,
    bytes_kept_for_backward,
)
from gradmap.model.layerwise import run_layers
from gradmap.pruning.plan import HealingPoint

BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0
WARM_UP, LAST_RATE = 0.03, 0.1
# The dense model is asked for so many steps at once: to take layers out and put them back is work.
ROUND_STEPS = 8
# How often held-out samples are looked at, and for which share of the work at most; a step takes as
# long as about four passes of its tokens.
FEWEST_LOOKS, MOST_LOOKS = 2, 20
LOOKING_SHARE, PASSES_OF_A_STEP = 0.1, 4


def rate_at(spent: float) -> float:
    """The learning rate, of its highest, when such a share of the budget is spent."""
    if spent < WARM_UP:
        return spent / WARM_UP
    onwards = min(1.0, (spent - WARM_UP) / (1 - WARM_UP))
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * onwards)) / 2


class Budget(NamedTuple):
    """Of training: one of the two. steps: a whole number of them; seconds: with all that is done in
    between."""

    steps: int | None
    seconds: float | None

    @classmethod
    def of(cls, options: HealOptions) -> Budget:
        if options.budget_minutes is not None:
            return cls(None, 60 * options.budget_minutes)
        assert options.budget_tokens is not None, "one of the two is given"
        return cls(options.budget_tokens // options.tokens_in_step, None)

    def spent(self, steps: int, seconds: float) -> float:
        """The share of it that is spent."""
        if self.seconds is not None:
            return seconds / self.seconds
        assert self.steps is not None
        return steps / self.steps

    def next_round(self, steps: int) -> int:
        """How many steps come next, behind so many."""
        return ROUND_STEPS if self.steps is None else min(ROUND_STEPS, self.steps - steps)


@dataclass
class Progress:
    """How far training is. losses: of the steps since the last look at held-out samples, nats per
    token; curve: all looks, the first before training; best: the parameters with the lowest
    held-out divergence so far."""

    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[HealingPoint] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)

    @property
    def lowest(self) -> float:
        return min((point.held_out_divergence for point in self.curve), default=math.inf)


class Trainer:
    """Trains a student.

    pruned: the model, and the held-out samples to judge by.
    """

    def __init__(
        self, pruned: Pruned, student: Student, samples: Samples, options: HealOptions
    ) -> None:
        self.pruned, self.student, self.options = pruned, student, options
        self.progress = Progress()
        self.parameters = student.parameters
        self.optimizer = torch.optim.AdamW(
            self.parameters, options.highest_rate, betas=BETAS, weight_decay=0.0
        )
        self.samples = samples
        self._budget = Budget.of(options)
        self._batches, self._recompute = Batches(1), False
        self._looks = looks_within(self._budget, options, pruned.calibration.held_out_ids.numel())
        self._clock = time.monotonic()
        self._track: Track = untracked

    @property
    def tokens(self) -> int:
        """So many were trained on."""
        return self.progress.steps * self.options.tokens_in_step

    def run(self, keep: Callable[[Trainer], None], track: Track) -> None:
        """Goes on from where the progress is until the budget is spent, and leaves the student as
        it was at its best. keep: told of it after every few steps; track: of every step and look.
        Raises UserError if the loss is no number any more."""
        self._track = track
        self._fit_into_memory()
        if not self.progress.curve:
            self._look()
        unit, total = self._shown()
        with progress(f"Healing ({unit})", total) as advance:
            advance(int(self._spent * total))
            while (before := self._spent) < 1:
                self._round()
                if int(before * self._looks) < int(self._spent * self._looks):
                    self._look()
                advance(int(self._spent * total) - int(before * total))
                keep(self)
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.progress.best, strict=True):
                parameter.copy_(best)

    def _fit_into_memory(self) -> None:
        """As many samples at once as memory is set apart for; if it is not enough for one, layers
        are run again for the backward pass."""
        kept = self._bytes_kept()
        fits = kept <= activation_bytes(self.pruned.model.device)
        self._recompute = not least_of_all(fits)
        if self._recompute:
            say("A sample's activations are large: layers are run again for the backward pass")
            kept = self._bytes_kept()
        size = batch_of(kept, self.options.tokens, self.pruned.model.device)
        self._batches = FixedBatches(least_of_all(size)) if self.options.shard else Batches(size)

    def _bytes_kept(self) -> int:
        """For the backward pass of one sample."""
        ids = self.pruned.calibration.held_out_ids[:1].to(self.pruned.model.device)
        lessons = Lessons(ids, self._dense_outputs(ids))
        with self._student_running():
            return bytes_kept_for_backward(partial(self._set_gradients, lessons, 1))

    @contextmanager
    def _student_running(self) -> Iterator[None]:
        changed = self.pruned.model.changed(self.student.changes, without=self.pruned.removed)
        with self.student.running(), changed:
            yield

    def _set_gradients(self, lessons: Lessons, samples: int) -> Tensor:
        """Of a step of so many samples; see `set_lesson_gradients`."""
        shared = self.options.shard and self.options.train == "full"
        return set_lesson_gradients(
            self.pruned.model,
            lessons,
            samples,
            self.parameters,
            self._batches,
            self._recompute,
            set_shared_gradients if shared else set_gradients,
        )

    @property
    def _spent(self) -> float:
        return self._budget.spent(self.progress.steps, self.progress.seconds)

    def _shown(self) -> tuple[str, int]:
        """What progress is counted in, and how much of it there is."""
        steps, seconds = self._budget
        return (
            ("s", int(seconds or 1))
            if steps is None
            else ("tokens", steps * self.options.tokens_in_step)
        )

    def _round(self) -> None:
        """Some steps: what the dense model makes of their samples first, for all of them."""
        steps = self._budget.next_round(self.progress.steps)
        in_step = self.options.samples_in_step
        drawn = self.samples.draw(steps * in_step).to(self.pruned.model.device)
        shares = [share_of_step(samples) for samples in drawn.split(in_step)]
        outputs = self._dense_outputs(torch.cat(shares)).split([len(share) for share in shares])
        with self._student_running():
            divergences = [
                self._step(number, Lessons(*lessons))
                for number, lessons in enumerate(zip(shares, outputs, strict=True), start=1)
            ]
        losses = summed(torch.stack(divergences)) / self.options.tokens_in_step
        self._take_note(losses.tolist())

    def _step(self, number: int, lessons: Lessons) -> Tensor:
        """The divergence of this process's share, summed over positions, before the step. number:
        of the step in its round."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(number)
        divergence = self._set_gradients(lessons, self.options.samples_in_step)
        nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)
        self.optimizer.step()
        return divergence

    def _rate(self, number: int) -> float:
        """The learning rate of a step of the next round."""
        spent = self._budget.spent(self.progress.steps + number, self.progress.seconds)
        return self.options.highest_rate * rate_at(spent)

    def _take_note(self, losses: list[float]) -> None:
        for number, loss in enumerate(losses, start=self.progress.steps + 1):
            if not math.isfinite(loss):
                raise UserError(
                    f"The loss of step {number} is {loss}: training has diverged; give a lower "
                    f"--learning-rate than {self.options.highest_rate:g}."
                )
        rates = [self._rate(number) for number in range(1, len(losses) + 1)]
        before = self.progress.seconds
        self._tick()
        trained = len(losses) * self.options.tokens_in_step
        speed = trained / (self.progress.seconds - before)
        self.progress.losses += losses
        for loss, rate in zip(losses, rates, strict=True):
            self.progress.steps += 1
            step = {"training_divergence": loss, "learning_rate": rate, "tokens_per_second": speed}
            self._track(self.tokens, step)

    @torch.no_grad()
    def _dense_outputs(self, input_ids: Tensor) -> Tensor:
        """(N, T) -> (N, T, d): the output of the dense model's last layer."""
        model, parts = self.pruned.model, []

        def run_batch(batch: slice) -> None:
            parts.append(run_layers(model, input_ids[batch]))

        self.pruned.batches.run(len(input_ids), run_batch)
        return torch.cat(parts)

    @torch.no_grad()
    def _look(self) -> None:
        """At the held-out samples: the best so far is kept."""
        found = self._held_out_divergence()
        require_finite("The held-out divergence", found)
        if found < self.progress.lowest:
            self.progress.best = [parameter.detach().clone() for parameter in self.parameters]
        self._tick()
        losses, self.progress.losses = self.progress.losses, []
        self._track(self.tokens, {"held_out_divergence": found})
        self.progress.curve.append(
            HealingPoint(
                tokens=self.tokens,
                seconds=round(self.progress.seconds, 3),
                training_divergence=sum(losses) / len(losses) if losses else None,
                held_out_divergence=found,
            )
        )
        say(f"Held-out divergence after {self.tokens} tokens: {found:.4f} nats per token")

    def _held_out_divergence(self) -> float:
        _ = self.pruned.wanted  # of the dense model, so before the student runs
        with self.student.running():
            found = self.pruned.divergence(self.student.changes)
        assert found is not None, "samples are held out"
        return found

    def _tick(self) -> None:
        """Counts the time since it was counted last; of several processes, the first one's."""
        now = time.monotonic()
        passed = now - self._clock if is_main_process() else 0.0
        self.progress.seconds += summed(torch.tensor(passed, dtype=torch.float64)).item()
        self._clock = now


def looks_within(budget: Budget, options: HealOptions, held_out_tokens: int) -> int:
    """How often held-out samples are looked at: seldom where there is little to train."""
    if budget.steps is None:
        return MOST_LOOKS
    passes = LOOKING_SHARE * PASSES_OF_A_STEP * budget.steps * options.tokens_in_step
    return min(MOST_LOOKS, budget.steps, max(FEWEST_LOOKS, int(passes / held_out_tokens)))
