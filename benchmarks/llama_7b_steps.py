"""The steps of the drill of benchmarks.llama_7b: what each does, what is predicted for it, and the
model and samples that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from benchmarks.random_model import make_random_llama
from gradmap.costs.steps import (
    CalibrationSize,
    Hardware,
    refit_flops,
    score_flops,
    selection_flops,
    training_flops,
)
from gradmap.costs.timing import writing_seconds
from gradmap.data.calibration import Calibration
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.distil import train_low_rank, written_by_dense
from gradmap.methods.distillation import Lessons
from gradmap.methods.gradmap.scores import GradientScorer
from gradmap.methods.repair import RepairScorer
from gradmap.methods.selection import Scorer, Subject, select
from gradmap.methods.sequential import refit_around_runs
from gradmap.model.batching import Batches, forward_batch
from gradmap.model.layered import LayeredModel
from gradmap.model.shape import Shape
from gradmap.model.sublayers import Pair

Facts = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """The shape that is pruned, and the size of its calibration."""

    shape: Shape
    size: CalibrationSize

    def described(self) -> dict[str, Any]:
        size = {"samples": self.size.samples, "tokens": self.size.tokens}
        return {
            "shape": self.shape.name,
            "layers": self.shape.layers,
            "removed": self.remove,
            **size,
        }

    @property
    def remove(self) -> int:
        return max(1, round(self.shape.layers / 4))

    @property
    def runs(self) -> int:
        """How many runs of two layers each are removed, as predictions have it."""
        return -(-self.remove // 2)

    @property
    def removed(self) -> tuple[Pair, ...]:
        """The layers that are gone for the steps that only repair: runs that are as far from each
        other as they can be."""
        starts = [
            self.shape.layers * number // (self.runs + 1) for number in range(1, self.runs + 1)
        ]
        seconds = [start + 1 for start in starts]
        return tuple(map(Pair.of_layer, [*starts, *seconds][: self.remove]))


@dataclass(frozen=True)
class Case:
    """The task's model and samples."""

    task: Task
    model: LayeredModel
    calibration: Calibration

    @property
    def pruned(self) -> Pruned:
        batches = Batches(forward_batch(self.calibration.input_ids, self.model.device))
        return Pruned(self.model, self.calibration, self.task.removed, batches)


@lru_cache(maxsize=1)
def make_case(task: Task) -> Case:
    on_gpu = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
    model = make_random_llama(task.shape, dtype, device)
    ids = torch.randint(task.shape.vocabulary, (task.size.samples, task.size.tokens))
    return Case(task, model, Calibration("random", 0, ids))


def choose_by(method: Callable[[Subject], Scorer]) -> Callable[[Case], Facts]:
    def choose(case: Case) -> Facts:
        subject = Subject(case.model, case.calibration)
        chosen = select(
            partial(method, subject),
            subject,
            case.task.remove,
            one_shot=False,
            done=(),
            record=lambda step: None,
        )
        return {"removed": [pair.written for pair in chosen.removal_order]}

    return choose


def refit(case: Case) -> Facts:
    corrections = refit_around_runs(case.pruned).corrections
    return {"relative_lambdas": [correction.relative_lambda for correction in corrections]}


def write(case: Case) -> Facts:
    return {"samples": len(written_by_dense(case.pruned))}


def train(case: Case) -> Facts:
    """Trains, after making what it learns from: what the dense model gives on the samples, and what
    it writes."""
    pruned, fit_ids = case.pruned, case.calibration.fit_ids
    ids = torch.cat([fit_ids, written_by_dense(pruned)])
    lessons = Lessons(ids, pruned.walk(pruned.sublayers, ids).finish({}))
    return {"corrections": len(train_low_rank(pruned, Compensation(), lessons))}


def predict_training(task: Task, hardware: Hardware) -> float:
    dense = task.size.fit_tokens * task.shape.layer_flops(task.shape.layers)
    flops = dense + training_flops(task.shape, task.remove, task.size)
    return flops / hardware.sustained_flops + writing_seconds(task.shape, hardware, task.size)


def by_flops(flops: Callable[[Task], float]) -> Callable[[Task, Hardware], float]:
    return lambda task, hardware: flops(task) / hardware.sustained_flops


@dataclass(frozen=True)
class DrillStep:
    """A step of the drill. run: the work. predict: its seconds. goal_s: for LLaMA-2-7B on an
    H100."""

    run: Callable[[Case], Facts]
    predict: Callable[[Task, Hardware], float]
    goal_s: float | None = None


STEPS = {
    "gradient scores": DrillStep(
        choose_by(GradientScorer),
        by_flops(lambda task: score_flops(task.shape, task.remove, task.size)),
        10,
    ),
    "the default's selection": DrillStep(
        choose_by(RepairScorer),
        by_flops(lambda task: selection_flops(task.shape, task.remove, task.size)),
        10,
    ),
    "refit": DrillStep(
        refit, by_flops(lambda task: refit_flops(task.shape, task.remove, task.runs, task.size)), 20
    ),
    "writing": DrillStep(
        write, lambda task, hardware: writing_seconds(task.shape, hardware, task.size), 5
    ),
    "training, with writing": DrillStep(train, predict_training),
}
