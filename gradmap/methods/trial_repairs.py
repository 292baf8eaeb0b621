"""Repairs that are tried while layers are chosen: a W' of the last map before a removal, and what
becomes of samples with it, from what is known of them without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from gradmap.methods.least_squares import plus_identity, ridge_sums, solve_ridge
from gradmap.methods.normed import before_gain, gain_factor, gain_sums
from gradmap.model.corrections import Change, Place, Projection
from gradmap.model.layered import LayeredModel, NormPlace
from gradmap.model.norms import root_mean_square
from gradmap.model.precision import widened

RELATIVE_LAMBDA = 0.1


class Repair(Protocol):
    """A change of the last map of a piece."""

    @property
    def changes(self) -> list[tuple[Place, Change]]: ...

    def leaving(self, given: Tensor, added: Tensor) -> Tensor:
        """What leaves the piece with it, given what leaves it without, and what its last map adds
        then, bias aside: (n, T, d) all."""
        ...

    def added_by_map(self, added: Tensor) -> Tensor:
        """What the map adds with it, bias aside."""
        ...


@dataclass(frozen=True)
class LinearRepair:
    """Of a map whose output is added to the hidden state, as it is or multiplied: S (d, d), W' less
    the identity."""

    place: Place
    matrix: Tensor

    @property
    def changes(self) -> list[tuple[Place, Change]]:
        return [(self.place, Projection(plus_identity(self.matrix)))]

    def leaving(self, given: Tensor, added: Tensor) -> Tensor:
        return given + added @ self.matrix.to(added).mT

    def added_by_map(self, added: Tensor) -> Tensor:
        return self.leaving(added, added)


@dataclass(frozen=True)
class NormedRepair:
    """Of a map that an RMS norm follows: S (d, d), W' less the identity, and the factor of the
    norm's gain that goes with it, (d,)."""

    normed: NormedMap
    matrix: Tensor
    factor: Tensor

    @property
    def changes(self) -> list[tuple[Place, Change]]:
        return [
            (self.normed.place, Projection(plus_identity(self.matrix))),
            self.normed.norm.changed(self.factor),
        ]

    def leaving(self, given: Tensor, added: Tensor) -> Tensor:
        before, after = self.normed.made(added), self.normed.made(self.added_by_map(added))
        return given - before.to(given) + (self.factor.to(after) * after).to(given)

    def added_by_map(self, added: Tensor) -> Tensor:
        return added + added @ self.matrix.to(added).mT


@dataclass(frozen=True)
class NormedMap:
    """A linear map and the RMS norm behind it. factor: of the norm's gain as it is now, (d,)."""

    model: LayeredModel
    place: Place
    norm: NormPlace
    factor: Tensor

    @property
    def module(self) -> nn.Module:
        return self.model.map_at(self.norm.place)

    @property
    def gain(self) -> Tensor:
        """(d,) float64."""
        gain = self.model.gain_at(self.norm)
        return self.factor.to(gain.device) * gain

    def entering(self, added: Tensor) -> Tensor:
        """What enters the norm, given what the map gives, bias aside."""
        bias: Tensor | None = getattr(self.model.map_at(self.place), "bias", None)
        return added if bias is None else added + bias.to(added)

    def made(self, added: Tensor) -> Tensor:
        """What the norm makes of that."""
        states = self.entering(added).to(self.module.get_parameter("weight").device)
        made: Tensor = self.factor.to(states) * self.module(states)
        return made.to(added.device)


def fit_repair(place: Place, given: Tensor, added: Tensor, wanted: Tensor) -> LinearRepair:
    """The one of a map with which what leaves its piece comes nearest to `wanted`, every token
    counted by 1 / |wanted|^2 (Eq. 10)."""
    gram, cross = ridge_sums(added, widened(wanted) - widened(given), wanted)
    matrix = solve_ridge(gram, cross, RELATIVE_LAMBDA * gram.diagonal().mean())
    return LinearRepair(place, matrix)


def fit_normed_repair(
    normed: NormedMap, given: Tensor, added: Tensor, wanted: Tensor
) -> NormedRepair:
    """The same, where a norm follows (see gradmap.methods.normed)."""
    missing = widened(wanted) - widened(given)
    features = widened(added) / root_mean_square(widened(normed.entering(added)))
    gram, cross = ridge_sums(features, missing, wanted)
    lam = RELATIVE_LAMBDA * gram.diagonal().mean()
    matrix = solve_ridge(gram, before_gain(cross, normed.gain), lam)
    repair = NormedRepair(normed, matrix, torch.ones_like(normed.factor))
    made = widened(normed.made(repair.added_by_map(added)))
    to_make = missing + widened(normed.made(added))
    factor = gain_factor(gain_sums(made, to_make, widened(wanted)))
    return replace(repair, factor=factor)


@dataclass(frozen=True)
class States:
    """What some samples are in pieces that follow each other: what enters each and leaves the last,
    (n, T, d) each, and what the last linear map of each adds, to the hidden state or to the norm
    behind it, bias aside, likewise."""

    entering: list[Tensor]
    added: list[Tensor]

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        """The states of the samples of all parts."""
        return cls(
            _joined([part.entering for part in parts]), _joined([part.added for part in parts])
        )

    def before(self, place: int, samples: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """What enters the piece at `place`, and what the last map of the one before it gives, of
        some samples."""
        entering, added = self.entering[place][samples], self.added[place - 1][samples]
        return entering.to(device, non_blocking=True), added.to(device, non_blocking=True)

    def without(self, place: int, repair: Repair, behind: States) -> States:
        """The states once what begins at `place` is gone, and the piece before it is repaired.

        behind: the states of the pieces behind it, beginning with what enters them.
        """
        return States(
            [*self.entering[:place], *behind.entering],
            [*self.added[: place - 1], repair.added_by_map(self.added[place - 1]), *behind.added],
        )


def _joined(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    """Of lists of (n, T, d), one for each part, the list of (N, T, d)."""
    return [torch.cat(of_place) for of_place in zip(*parts, strict=True)]
