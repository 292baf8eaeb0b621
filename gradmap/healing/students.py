"""What is trained: low-rank factors beside the weights, or an update of every weight.

Either way the weights themselves stay as they are, so that the dense model, which teaches, is the
same network with the student's part switched off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers.pytorch_utils import Conv1D

from gradmap.common.distributed import whole
from gradmap.model.corrections import (
    Change,
    Changes,
    LowRank,
    Place,
    Trained,
    untrained_low_rank,
    weight_of,
)
from gradmap.model.layered import LayeredModel
from gradmap.model.sublayers import Sublayer

Kind = TypeVar("Kind", bound=Change)


class Student(Protocol):
    """What is trained of the linear maps that are left. changes: of the plan and, unless `running`
    brings them, what is trained; they are on hooks while the student runs."""

    changes: Changes

    @property
    def parameters(self) -> list[Tensor]:
        """What training changes, always in the same order."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """The model computes as the student in the block, once `changes` are on hooks."""
        ...

    def trained(self) -> Mapping[Place, LowRank | Trained]:
        """What was made of each weight, in the CPU's memory; all processes have to ask."""
        ...


class LowRankStudent:
    """Trains factors (LoRA, Hu et al. 2021, arXiv 2106.09685), on hooks."""

    def __init__(self, factors: Mapping[Place, LowRank], changes: Changes) -> None:
        self._factors = factors
        self.changes: Changes = with_trained(changes, factors)

    @classmethod
    def begin(
        cls,
        model: LayeredModel,
        sublayers: Sequence[Sublayer],
        changes: Changes,
        rank: int,
        generator: torch.Generator,
    ) -> LowRankStudent:
        """Of every linear map of these. Factors go on from those that the plan has."""
        factors: dict[Place, LowRank] = {}
        for place, module in model.linear_maps(sublayers):
            known = _first_of(LowRank, changes.get(place, ()))
            factors[place] = untrained_low_rank(module, rank, generator, known)
        return cls(factors, changes)

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for factor in self._factors.values() for tensor in (factor.down, factor.up)]

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def trained(self) -> dict[Place, LowRank]:
        return {
            place: LowRank(whole(factor.down), whole(factor.up))
            for place, factor in self._factors.items()
        }


class FullRankStudent:
    """Trains an update of every weight of the linear maps, which is added to it in each pass.

    The model has these updates from then on, switched off but while the student runs. stored: the
    dtype that they end in.
    """

    def __init__(
        self,
        model: LayeredModel,
        sublayers: Sequence[Sublayer],
        changes: Changes,
        stored: torch.dtype,
    ) -> None:
        self._stored = stored
        self._modules: dict[Place, nn.Module] = {}
        for place, module in list(model.linear_maps(sublayers)):
            update = _untrained_update(module, _first_of(Trained, changes.get(place, ())))
            register_parametrization(module, "weight", WithUpdate(update))
            self._modules[place] = module
        self.changes: Changes = {
            place: [change for change in of_place if not isinstance(change, Trained)]
            for place, of_place in changes.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        return [each.update for each in self._updates()]

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            for each in self._updates():
                each.on = True
            yield
        finally:
            for each in self._updates():
                each.on = False

    def trained(self) -> dict[Place, Trained]:
        updates = zip(self._modules.items(), self._updates(), strict=True)
        return {
            place: Trained(_as_matrix(module, whole(each.update)).to(self._stored))
            for (place, module), each in updates
        }

    def _updates(self) -> list[WithUpdate]:
        return [
            cast(WithUpdate, module.get_submodule("parametrizations.weight.0"))
            for module in self._modules.values()
        ]


class WithUpdate(nn.Module):
    """A weight with an update of its shape, which is added while it is `on`."""

    def __init__(self, update: Tensor) -> None:
        super().__init__()
        self.update = nn.Parameter(update)
        self.on = False

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + self.update).to(weight.dtype) if self.on else weight


def _untrained_update(module: nn.Module, known: Trained | None) -> Tensor:
    """Zero, or what is known; in the shape in which the weight is stored, float32 or wider."""
    weight = weight_of(module)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    matrix = torch.zeros(weight.shape, dtype=dtype) if known is None else known.matrix
    stored = _as_matrix(module, matrix).to(weight.device, dtype, copy=True)
    return stored.contiguous()


def _as_matrix(module: nn.Module, stored: Tensor) -> Tensor:
    """(d_out, d_in) of what is stored as the weight is, or the other way round."""
    return stored.mT if isinstance(module, Conv1D) else stored


def _first_of(kind: type[Kind], changes: Sequence[Change]) -> Kind | None:
    return next((change for change in changes if isinstance(change, kind)), None)


def with_trained(
    changes: Changes, trained: Mapping[Place, LowRank | Trained]
) -> dict[Place, tuple[Change, ...]]:
    """The changes with what was trained in place of their own of that kind. Where they have none,
    factors come last, and updates first."""
    together = {place: tuple(of_place) for place, of_place in changes.items()}
    for place, made in trained.items():
        together[place] = _with_one(together.get(place, ()), made)
    return together


def _with_one(changes: Sequence[Change], made: LowRank | Trained) -> tuple[Change, ...]:
    known = _first_of(type(made), changes)
    if known is not None:
        return tuple(made if change is known else change for change in changes)
    return (made, *changes) if isinstance(made, Trained) else (*changes, made)
