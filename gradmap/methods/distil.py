"""Low-rank corrections of every linear map that is left, trained to predict what the dense model
does.

The loss is the cross-entropy between the two next-token distributions (Hinton et al. 2015, arXiv
1503.02531), the trained matrices are LoRA's (Hu et al. 2021, arXiv 2106.09685). They fold into the
weights like any other correction, and a plan stays as small as its rank. What was fitted in closed
form comes first: training starts where it ends. A calibration set is too small to train on again
and again, or to fit wide maps on at all; the dense model itself writes what else is needed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gradmap.common.console import progress
from gradmap.common.distributed import (
    gathered,
    say_if_some_are_idle,
    share_of,
    share_of_step,
)
from gradmap.costs.timing import distil_seconds
from gradmap.methods.base import Compensator
from gradmap.methods.compensation import Compensation, Correction, Pruned
from gradmap.methods.distillation import Lessons, set_lesson_gradients
from gradmap.methods.features import Walks
from gradmap.methods.ridge import TOKENS_PER_INPUT, fitted_inputs
from gradmap.methods.sequential import fit_around_runs
from gradmap.methods.writing import draw_prompts, uniform_numbers, write_all
from gradmap.model.batching import Batches
from gradmap.model.corrections import (
    LowRank,
    followed_by,
    untrained_low_rank,
)

RANK = 16
LEARNING_RATE = 1e-3
STEP_SAMPLES = 4
# How many texts the dense model writes, for each calibration sample at least.
WRITTEN_PER_SAMPLE = 2


def distil(pruned: Pruned) -> Compensation:
    """Repairs around every run in closed form, where that can be done, and then trains; both on the
    calibration samples and on what the dense model writes."""
    calibration = pruned.calibration.fitted_also_on(written_by_dense(pruned))
    pruned = replace(pruned, calibration=calibration)
    walks = Walks.start(pruned)
    kind = _closed_form_kind(pruned)
    closed_form = Compensation() if kind is None else fit_around_runs(pruned, kind, walks)
    fit_ids = calibration.fit_ids
    lessons = Lessons(fit_ids, gathered(walks.dense.finish({}), len(fit_ids)))
    return Compensation((*closed_form.corrections, *train_low_rank(pruned, closed_form, lessons)))


def samples_lacking(pruned: Pruned) -> int:
    """How many samples the closed form lacks, with which the dense model helps out."""
    kind = _closed_form_kind(pruned)
    if kind is None:
        return 0
    count, length = pruned.calibration.fit_ids.shape
    return max(0, math.ceil(TOKENS_PER_INPUT * fitted_inputs(pruned, kind) / length) - count)


def _closed_form_kind(pruned: Pruned) -> str | None:
    """The kind of Fit that comes first; None where there is no closed form."""
    if not pruned.model.architecture.is_fitted:
        return None
    # experts are too many to refit
    return "refit" if pruned.model.architecture.expert_down_projections is None else "left"


def train_low_rank(
    pruned: Pruned, so_far: Compensation, lessons: Lessons
) -> tuple[Correction, ...]:
    """Corrections on top of those so far, from one pass over the lessons."""
    generator = torch.Generator().manual_seed(pruned.calibration.seed)
    maps = pruned.model.linear_maps(pruned.kept)
    factors = [(place, untrained_low_rank(module, RANK, generator)) for place, module in maps]
    parameters = [tensor for _, factor in factors for tensor in (factor.down, factor.up)]
    together = followed_by(so_far.changes, factors)
    goal = lessons.outputs
    samples = lessons.input_ids.to(goal.device)
    order = torch.randperm(len(samples), generator=generator).to(goal.device)
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, math.ceil(len(samples) / STEP_SAMPLES)
    )
    batches = Batches(STEP_SAMPLES)
    say_if_some_are_idle(STEP_SAMPLES)
    with (
        progress("Distilling (samples)", len(samples)) as advance,
        pruned.model.changed(together, without=pruned.removed),
    ):
        for rows in order.split(STEP_SAMPLES):
            step = Lessons(share_of_step(samples[rows]), share_of_step(goal[rows]))
            set_lesson_gradients(pruned.model, step, len(rows), parameters, batches)
            optimizer.step()
            schedule.step()
            advance(len(rows))
    return pruned.judge(
        [(place, _trained(factor)) for place, factor in factors],
        so_far.changes,
        so_far.held_out_divergence,
    )


def written_by_dense(pruned: Pruned) -> Tensor:
    """Samples (N, T) that begin with a few tokens from the calibration samples to fit on, and go on
    as the dense model would (as in LLM-QAT, Liu et al. 2023, arXiv 2305.17888).

    Up to rounding the same on every device and for any number of processes, which write a share
    each. Rounding may turn a token into another, and the text goes on from there.
    """
    known, seed = pruned.calibration.fit_ids, pruned.calibration.seed
    count = max(WRITTEN_PER_SAMPLE * len(known), samples_lacking(pruned))
    drawn = draw_prompts(known, pruned.calibration.bos, count, seed)
    length = drawn.shape[1]
    prompts, _ = share_of(drawn)
    numbers, _ = share_of(uniform_numbers(count, known.shape[1] - length, seed))
    return gathered(write_all(pruned.model, prompts, numbers), count)


def _trained(factor: LowRank) -> LowRank:
    return LowRank(factor.down.detach(), factor.up.detach())


COMPENSATOR = Compensator(
    name="distil",
    about="repairs in closed form, then trains low-rank corrections to predict what the dense "
    "model does",
    run=distil,
    in_memory=True,
    by_held_out=True,
    seconds=distil_seconds,
)
