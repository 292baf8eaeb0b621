"""How weights that stay are changed: unfolded, on a hook of a model in memory, or folded into the weight itself.

Both are the same linear map: folding is exact, and a test compares the two for every kind of change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from gradmap.architectures import Architecture, without_layers


class Place(NamedTuple):
    """A linear map: the original index of its layer, and its path inside the layer."""

    layer: int
    target: str


class Change(Protocol):
    """A change of a weight W (d_out, d_in). The bias stays as it is."""

    kind: ClassVar[str]

    def added(self, inputs: Tensor, output: Tensor) -> Tensor:
        """What the change adds to the map's output (..., d_out), given its inputs (..., d_in) and W inputs."""
        ...

    def fold(self, weight: Tensor) -> Tensor:
        """The changed weight; (d_out, d_in) float64 both."""
        ...

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored of it: the arguments of the class, by name."""
        ...


@dataclass(frozen=True)
class Projection:
    """W <- W' W (Eq. 13). matrix: W' (d_out, d_out)."""

    kind: ClassVar[str] = "projection"
    matrix: Tensor

    def added(self, inputs: Tensor, output: Tensor) -> Tensor:
        return output @ self.matrix.to(output).mT - output

    def fold(self, weight: Tensor) -> Tensor:
        return self.matrix.double() @ weight

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}


@dataclass(frozen=True)
class Update:
    """W <- W + matrix, (d_out, d_in)."""

    kind: ClassVar[str] = "update"
    matrix: Tensor

    def added(self, inputs: Tensor, output: Tensor) -> Tensor:
        return inputs @ self.matrix.to(inputs).mT

    def fold(self, weight: Tensor) -> Tensor:
        return weight + self.matrix.double()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}


@dataclass(frozen=True)
class LowRank:
    """W <- W + up down, with down (r, d_in) and up (d_out, r) (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

    kind: ClassVar[str] = "low-rank"
    down: Tensor
    up: Tensor

    def added(self, inputs: Tensor, output: Tensor) -> Tensor:
        return inputs @ self.down.to(inputs).mT @ self.up.to(inputs).mT

    def fold(self, weight: Tensor) -> Tensor:
        return weight + self.up.double() @ self.down.double()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}


CHANGES: dict[str, type[Projection] | type[Update] | type[LowRank]] = {
    kind.kind: kind for kind in (Projection, Update, LowRank)
}
# What is done to a weight, in this order.
Changes = Mapping[Place, Sequence[Change]]


def gather_changes(pairs: Sequence[tuple[Place, Change]]) -> dict[Place, tuple[Change, ...]]:
    """Changes by the weight they change, in order."""
    gathered: dict[Place, tuple[Change, ...]] = {}
    for place, change in pairs:
        gathered[place] = (*gathered.get(place, ()), change)
    return gathered


def fold_changes(weight: Tensor, changes: Sequence[Change], transposed: bool) -> Tensor:
    """The changed weight in float64; a transposed one (Conv1D) is stored (d_in, d_out)."""
    folded = weight.double().mT if transposed else weight.double()
    for change in changes:
        folded = change.fold(folded)
    return folded.mT if transposed else folded


@contextmanager
def corrected(model: Any, architecture: Architecture, changes: Changes) -> Iterator[None]:
    """Runs the whole `model` with changes on hooks."""
    layers = architecture.layer_list(model)
    with ExitStack() as stack:
        for place, of_place in changes.items():
            module = layers[place.layer].get_submodule(place.target)
            stack.callback(module.register_forward_hook(_apply(of_place)).remove)
        yield


@contextmanager
def pruned_and_corrected(
    model: Any, architecture: Architecture, removed: Sequence[int], changes: Changes
) -> Iterator[None]:
    """Runs `model` without the `removed` layers and with the changes, unfolded."""
    with corrected(model, architecture, changes), without_layers(model, architecture, removed):
        yield


def linear_output(module: nn.Module, output: Tensor) -> Tensor:
    """The output of a linear map without its bias (a mixture of experts has none)."""
    bias: Tensor | None = getattr(module, "bias", None)
    return output if bias is None else output - bias


def _apply(changes: Sequence[Change]) -> Any:
    def on_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for change in changes:
            output = output + change.added(args[0], linear_output(module, output)).to(output.dtype)
        return output

    return on_forward
