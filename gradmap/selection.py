"""Which layers go, and in which order (Algorithm 1, stage 1). Selectors are looked up by name in `SELECTORS`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gradmap.architectures import Architecture, without_layers
from gradmap.console import progress
from gradmap.importance import layer_scores


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


class Selector(Protocol):
    """Chooses `count` layers to remove. `model` is whole again afterwards. input_ids: (N, T)."""

    def __call__(
        self, model: Any, architecture: Architecture, input_ids: Tensor, count: int, *, one_shot: bool, batch_size: int
    ) -> Selection: ...


def select_by_gradient(
    model: Any, architecture: Architecture, input_ids: Tensor, count: int, *, one_shot: bool, batch_size: int
) -> Selection:
    """GradMAP stage 1: remove the layer of the smallest score, score the smaller model again, until `count` are gone.

    With `one_shot`, the scores of the whole model decide all removals (Table 5's ablation).
    """
    rounds = 1 if one_shot else count
    steps: list[Step] = []
    removed: list[int] = []
    alive = list(range(len(architecture.layer_list(model))))
    with progress("Scoring layers (samples)", rounds * len(input_ids)) as advance:
        for _ in range(rounds):
            with without_layers(model, architecture, removed):
                scores = layer_scores(model, architecture, input_ids, batch_size, advance)
            chosen = [alive[int(position)] for position in torch.argsort(scores, stable=True)[: count // rounds]]
            steps.append(Step(dict(zip(alive, scores.tolist(), strict=True)), tuple(chosen)))
            removed += chosen
            alive = [layer for layer in alive if layer not in chosen]
    return Selection(tuple(steps))


SELECTORS: dict[str, Selector] = {"gradient": select_by_gradient}
