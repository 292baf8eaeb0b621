"""How weights that stay are changed: unfolded, on a hook of a model in memory, or folded into the
weight itself.

Both are the same linear map: folding is exact, and a test compares the two for every kind of
change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ALL = slice(None)
# Of a weight in float64, so much is folded at a time: what stays in a CPU's cache.
FOLD_BYTES = 1 << 22
# The target of what acts on the hidden state that leaves a layer. No stock layer can hold it.
HIDDEN_STATE = ""


class Place(NamedTuple):
    """A linear map: the original index of its layer, and its path inside the layer; or
    HIDDEN_STATE."""

    layer: int
    target: str


class Change(Protocol):
    """A change of a linear map, whose weight W is (d_out, d_in)."""

    kind: ClassVar[str]
    mixes_rows: ClassVar[bool]

    def added(self, inputs: Tensor, output: Tensor, bias: Tensor | float) -> Tensor:
        """What the change adds to the map's output W inputs + bias, (..., d_out), given its inputs
        (..., d_in)."""
        ...

    def fold(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        """What these rows of the weight, (n, d_in) float64, become; in the memory that was given,
        if that can be.

        They are all of them if the change mixes rows.
        """
        ...

    def fold_vector(self, vector: Tensor) -> Tensor:
        """The changed bias, or weight of a norm; (d_out,) float64 both."""
        ...

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored of it: the arguments of the class, by name."""
        ...


class _BiasStays:
    def fold_vector(self, vector: Tensor) -> Tensor:
        return vector


@dataclass(frozen=True)
class Projection(_BiasStays):
    """W <- W' W (Eq. 13). matrix: W' (d_out, d_out)."""

    kind: ClassVar[str] = "projection"
    mixes_rows: ClassVar[bool] = True
    matrix: Tensor

    def added(self, inputs: Tensor, output: Tensor, bias: Tensor | float) -> Tensor:
        linear = output - bias
        return linear @ self.matrix.to(linear).mT - linear

    def fold(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        return self.matrix.double() @ weight

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}


@dataclass(frozen=True)
class Update(_BiasStays):
    """W <- W + matrix, (d_out, d_in)."""

    kind: ClassVar[str] = "update"
    mixes_rows: ClassVar[bool] = False
    matrix: Tensor

    def added(self, inputs: Tensor, output: Tensor, bias: Tensor | float) -> Tensor:
        return inputs @ self.matrix.to(inputs).mT

    def fold(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        return weight.add_(self.matrix[rows])

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}


@dataclass(frozen=True)
class Trained(Update):
    """An update that was trained, of full rank. It comes before all other changes of its weight:
    those see W + matrix."""

    kind: ClassVar[str] = "trained"


@dataclass(frozen=True)
class LowRank(_BiasStays):
    """W <- W + up down, with down (r, d_in) and up (d_out, r) (LoRA, Hu et al. 2021, arXiv
    2106.09685)."""

    kind: ClassVar[str] = "low-rank"
    mixes_rows: ClassVar[bool] = False
    down: Tensor
    up: Tensor

    def added(self, inputs: Tensor, output: Tensor, bias: Tensor | float) -> Tensor:
        return inputs @ self.down.to(inputs).mT @ self.up.to(inputs).mT

    def fold(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        return weight.addmm_(self.up[rows].double(), self.down.double())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}


@dataclass(frozen=True)
class Scale:
    """W <- factor W, and the bias likewise. factor: () a number."""

    kind: ClassVar[str] = "scale"
    mixes_rows: ClassVar[bool] = False
    factor: Tensor

    def added(self, inputs: Tensor, output: Tensor, bias: Tensor | float) -> Tensor:
        return output * (self.factor.double() - 1)

    def fold(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        return weight.mul_(self.factor.double())

    def fold_vector(self, vector: Tensor) -> Tensor:
        return vector * self.factor.double()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"factor": self.factor}


@dataclass(frozen=True)
class Gain:
    """g <- factor g, the gain of a norm, (d,). factor: (d,). offset: () what the norm adds to its
    weight to make its gain."""

    kind: ClassVar[str] = "gain"
    mixes_rows: ClassVar[bool] = False
    factor: Tensor
    offset: Tensor

    @classmethod
    def of(cls, factor: Tensor, offset: float) -> Gain:
        return cls(factor, torch.tensor(offset, dtype=torch.float64))

    def added(self, inputs: Tensor, output: Tensor, bias: Tensor | float) -> Tensor:
        return output * (self.factor - 1)

    def fold(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        raise TypeError("a norm has no matrix")

    def fold_vector(self, vector: Tensor) -> Tensor:
        offset = self.offset.double()
        return self.factor.double() * (offset + vector) - offset

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"factor": self.factor, "offset": self.offset}


CHANGES: dict[str, type[Projection | Update | Trained | LowRank | Scale | Gain]] = {
    kind.kind: kind for kind in (Projection, Update, Trained, LowRank, Scale, Gain)
}
# What is done to a weight, in this order.
Changes = Mapping[Place, Sequence[Change]]


def gather_changes(pairs: Sequence[tuple[Place, Change]]) -> dict[Place, tuple[Change, ...]]:
    """Changes by the weight they change, in order."""
    gathered: dict[Place, tuple[Change, ...]] = {}
    for place, change in pairs:
        gathered[place] = (*gathered.get(place, ()), change)
    return gathered


def followed_by(
    changes: Changes, pairs: Sequence[tuple[Place, Change]]
) -> dict[Place, tuple[Change, ...]]:
    """`changes`, and then those of `pairs`."""
    return gather_changes(
        [*((place, change) for place, each in changes.items() for change in each), *pairs]
    )


def fold_changes(
    tensor: Tensor, changes: Sequence[Change], transposed: bool, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The changed weight (of a map; or of a norm, or a bias, (d_out,)), computed in float64 and
    rounded once to `dtype`.

    A transposed weight (Conv1D) is stored (d_in, d_out). A weight is folded some rows at a time
    unless a change mixes them: whole, its copies in float64 would take several times as long to go
    to memory and back as to compute.
    """
    if tensor.dim() == 1:
        vector = tensor.double()
        for change in changes:
            vector = change.fold_vector(vector)
        return vector.to(dtype)
    folded = torch.empty_like(tensor, dtype=dtype)
    weight, target = (tensor.mT, folded.mT) if transposed else (tensor, folded)
    d_out, d_in = weight.shape
    mixed = any(change.mixes_rows for change in changes)
    together = d_out if mixed else max(1, FOLD_BYTES // (torch.float64.itemsize * d_in))
    for start in range(0, d_out, together):
        rows = slice(start, start + together)
        target[rows] = _fold_rows(weight[rows], changes, rows)
    return folded


def _fold_rows(weight: Tensor, changes: Sequence[Change], rows: slice) -> Tensor:
    """weight: those rows of it, (n, d_in). Returns float64."""
    folded = weight.to(torch.float64, copy=True)
    for change in changes:
        folded = change.fold(folded, rows)
    return folded


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear map as (d_out, d_in), which Conv1D stores the other way round."""
    weight: Tensor = module.get_parameter("weight")
    return weight.mT if isinstance(module, Conv1D) else weight


def untrained_low_rank(
    module: nn.Module, rank: int, generator: torch.Generator, known: LowRank | None = None
) -> LowRank:
    """Factors to train. They change nothing yet: `up` is zero.

    known: factors to go on from, which are part of these and change what they did. Where their rank
    is higher, so is this one's.
    """
    weight = weight_of(module)
    d_out, d_in = weight.shape
    rank = rank if known is None else max(rank, len(known.down))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    down = torch.randn(rank, d_in, generator=generator, dtype=dtype).to(weight.device) / d_in**0.5
    up = torch.zeros(d_out, rank, dtype=dtype, device=weight.device)
    if known is not None:
        down[: len(known.down)] = known.down.to(down)
        up[:, : len(known.down)] = known.up.to(up)
    return LowRank(down.requires_grad_(True), up.requires_grad_(True))


def linear_output(module: nn.Module, output: Tensor) -> Tensor:
    """The output of a linear map without its bias (a mixture of experts has none)."""
    bias: Tensor | None = getattr(module, "bias", None)
    return output if bias is None else output - bias


def correcting_hook(changes: Sequence[Change]) -> Callable[..., Any]:
    """A forward hook of a linear map, or of a layer, that makes these changes."""
    placed: list[Change] = []

    def on_forward(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        given: Tensor = output[0] if isinstance(output, tuple) else output
        # once, at the first pass, which tells where and in what dtype the module computes
        if not placed:
            placed.extend(_placed(change, given) for change in changes)
        bias: Tensor | None = getattr(module, "bias", None)
        for change in placed:
            added = change.added(args[0], given, 0.0 if bias is None else bias)
            given = given + added.to(given.dtype)
            bias = None if bias is None else change.fold_vector(bias)
        return (given, *output[1:]) if isinstance(output, tuple) else given

    return on_forward


def _placed(change: Change, like: Tensor) -> Change:
    """The change in the memory and the dtype of a tensor; but what is trained stays the tensor it
    is."""

    def place(tensor: Tensor) -> Tensor:
        return tensor if tensor.requires_grad or tensor.dim() == 0 else tensor.to(like)

    return type(change)(**{name: place(tensor) for name, tensor in change.tensors.items()})
