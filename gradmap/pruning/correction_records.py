"""What a plan says of its corrections, and how it stores them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import ConfigDict, Field
from torch import Tensor

from gradmap.common.reading import Strict
from gradmap.methods.compensation import Correction
from gradmap.model.corrections import (
    HIDDEN_STATE,
    Gain,
    LowRank,
    Place,
    Projection,
    Scale,
    Trained,
    Update,
)


class CorrectionRecord(Strict):
    """One correction of the weight of `target`, a linear map inside a layer (original index).

    kind: one of gradmap.model.corrections.CHANGES; its tensors are stored if it was accepted
    (gradmap.pruning.plan_tensors). Corrections of one weight apply in order. `lambda`
    is Eq. 12's, relative_lambda the same over the mean diagonal of the Gram matrix; null for what
    was trained. Losses are nats per token, or null if nothing was held out.
    """

    model_config = ConfigDict(
        validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )

    layer: int
    target: str
    kind: str
    lam: float | None = Field(alias="lambda")
    relative_lambda: float | None
    held_out_divergence_before: float | None
    held_out_divergence_after: float | None
    accepted: bool

    @classmethod
    def of(cls, correction: Correction) -> CorrectionRecord:
        return cls(
            layer=correction.place.layer,
            target=correction.place.target,
            kind=correction.change.kind,
            lam=correction.lam,
            relative_lambda=correction.relative_lambda,
            held_out_divergence_before=correction.held_out_divergence_before,
            held_out_divergence_after=correction.held_out_divergence_after,
            accepted=correction.accepted,
        )

    @property
    def place(self) -> Place:
        return Place(self.layer, self.target)

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.target}.{self.kind}"


class Stored(NamedTuple):
    """A correction that was accepted, and what its tensors' names begin with."""

    record: CorrectionRecord
    name: str

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the change, of any shape, by the names that they are stored by."""
        return {f"{self.name}.{name}": tensor for name, tensor in tensors.items()}

    def own(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the change, by their own names, of all that are stored."""
        prefix = f"{self.name}."
        names = [name for name in stored if name.startswith(prefix)]
        return {name.removeprefix(prefix): stored[name] for name in names}


def stored(records: Sequence[CorrectionRecord]) -> Iterator[Stored]:
    """Those that were accepted, in order. Of several of one kind and weight, which a plan has that
    was gone on from, the second is called NAME-2."""
    so_far: Counter[str] = Counter()
    for record in records:
        if record.accepted:
            so_far[record.name] += 1
            number = so_far[record.name]
            yield Stored(record, record.name if number == 1 else f"{record.name}-{number}")


@dataclass(frozen=True)
class CorrectionGroup:
    """Corrections that were fitted together, for people to read."""

    corrections: tuple[CorrectionRecord, ...]

    @property
    def accepted(self) -> bool:
        return self.corrections[0].accepted

    def describe(self) -> str:
        first = self.corrections[0]
        what = self._what(first)
        if first.held_out_divergence_before is None:
            return f"{what}, applied as it is: nothing was held out to judge it by"
        before, after = first.held_out_divergence_before, first.held_out_divergence_after
        change = f"held-out divergence {before:.3f} -> {after:.3f} nats per token"
        return f"{what}: {change}{'' if self.accepted else ', left out, because it does not help'}"

    def _what(self, first: CorrectionRecord) -> str:
        count = len(self.corrections)
        if first.target == HIDDEN_STATE:
            return f"a patch of the hidden state behind layer {first.layer} (original index)"
        where = f"the {first.target} of layer {first.layer} (original index)"
        return {
            Projection.kind: f"a projection W' of {where}",
            Update.kind: f"a refit of {where}"
            if count == 1
            else f"new weights for {count} linear maps",
            Trained.kind: f"trained weights of {count} linear maps",
            LowRank.kind: f"low-rank corrections of {count} linear maps",
            Scale.kind: f"other scales of {count} linear maps",
            Gain.kind: f"another gain of {where}",
        }[first.kind]
