"""Which layers go, and in which order (Algorithm 1, stage 1). Selectors are looked up by name in `SELECTORS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gradmap.architectures import Architecture, without_layers
from gradmap.console import progress
from gradmap.distributed import share_of
from gradmap.importance import fitting_batches, layer_scores, streamed_layer_scores


@dataclass(frozen=True)
class Step:
    """One decision: the score of every layer alive before it, and the layers it removed (original indices)."""

    scores: dict[int, float]
    removed: tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """The outcome of stage 1. The removal order is nested: its first k entries are the choice for k layers."""

    steps: tuple[Step, ...]

    @property
    def removal_order(self) -> tuple[int, ...]:
        return tuple(layer for step in self.steps for layer in step.removed)

    def first(self, count: int) -> Selection:
        """The selection of the first `count` layers, which is what a run for `count` layers would have chosen."""
        steps: list[Step] = []
        for step in self.steps:
            removed = step.removed[:count]
            count -= len(removed)
            if removed:
                steps.append(Step(step.scores, removed))
        return Selection(tuple(steps))


class Selector(Protocol):
    """Chooses `count` layers to remove. `model` is whole again afterwards. input_ids: (N, T).

    streamed: whether only one layer of `model` is in memory at a time. done: decisions of an interrupted run, which are
    not made again. record: told of every new one.
    """

    def __call__(
        self,
        model: Any,
        architecture: Architecture,
        input_ids: Tensor,
        count: int,
        *,
        one_shot: bool,
        streamed: bool,
        done: Sequence[Step],
        record: Callable[[Step], None],
    ) -> Selection: ...


def select_by_gradient(
    model: Any,
    architecture: Architecture,
    input_ids: Tensor,
    count: int,
    *,
    one_shot: bool,
    streamed: bool,
    done: Sequence[Step],
    record: Callable[[Step], None],
) -> Selection:
    """GradMAP stage 1: remove the layer of the smallest score, score the smaller model again, until `count` are gone.

    With `one_shot`, the scores of the whole model decide all removals (Table 5's ablation).
    """
    rounds = 1 if one_shot else count
    steps = list(done)
    if len(steps) >= rounds:
        return Selection(tuple(steps)).first(count)
    layers = range(len(architecture.layer_list(model)))
    batches = fitting_batches(model, architecture, input_ids, streamed)
    entering: list[Tensor] = []
    alive_in_all = sum(len(layers) - removed for removed in range(len(steps), rounds))
    with progress("Scoring (layers x samples, both ways)", 2 * alive_in_all * len(share_of(input_ids)[0])) as advance:
        for _ in range(len(steps), rounds):
            removed = Selection(tuple(steps)).removal_order
            alive = [layer for layer in layers if layer not in removed]
            with without_layers(model, architecture, removed):
                if streamed:
                    scores = streamed_layer_scores(model, architecture, input_ids, batches, entering, advance)
                else:
                    scores = layer_scores(model, architecture, input_ids, batches, advance)
            lowest = torch.argsort(scores, stable=True)[: count // rounds].tolist()
            steps.append(Step(dict(zip(alive, scores.tolist(), strict=True)), tuple(alive[place] for place in lowest)))
            record(steps[-1])
            del entering[min(lowest) + 1 :]  # what enters the first removed layer now enters the one after it
    return Selection(tuple(steps)).first(count)


SELECTORS: dict[str, Selector] = {"gradient": select_by_gradient}
