"""What becomes of a plan that was healed: its records, and the tensors beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gradmap.data.mixture import Samples
from gradmap.healing.trainer import Trainer, with_low_rank
from gradmap.model.corrections import Changes, LowRank, Place
from gradmap.pruning.plan import SCHEMA_VERSION, CorrectionRecord, HealingRecord, Plan


def healed_plan(
    plan: Plan, changes: Changes, trainer: Trainer, samples: Samples
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan with the best that was trained, if it is better than nothing, and the tensors of all
    its corrections. changes: the plan's."""
    healing = _describe(trainer, samples)
    before, after = healing.curve[0].held_out_divergence, healing.lowest_divergence
    accepted = after < before
    best = trainer.best_factors
    trained = {place: _record(place, before, after, accepted) for place in best}
    healed = plan.model_copy(
        update={
            "schema_version": SCHEMA_VERSION,
            "corrections": _together(plan.corrections, trained, accepted),
            "healing": [*plan.healing, healing],
        }
    )
    return healed, _tensors(healed, with_low_rank(changes, best) if accepted else changes)


def _describe(trainer: Trainer, samples: Samples) -> HealingRecord:
    return HealingRecord(
        recipe=trainer.options.model_dump(mode="json"),
        samples=samples.drawn,
        bos=samples.bos,
        sha256=samples.sha256,
        passes=samples.passes,
        curve=trainer.progress.curve,
    )


def _record(place: Place, before: float, after: float, accepted: bool) -> CorrectionRecord:
    return CorrectionRecord(
        layer=place.layer,
        target=place.target,
        kind=LowRank.kind,
        lam=None,
        relative_lambda=None,
        held_out_divergence_before=before,
        held_out_divergence_after=after,
        accepted=accepted,
    )


def _together(
    known: Sequence[CorrectionRecord], trained: Mapping[Place, CorrectionRecord], accepted: bool
) -> list[CorrectionRecord]:
    """What was trained stands where the plan had its like, whose factors it goes on from, or
    last."""
    if not accepted:
        return [*known, *trained.values()]
    rest = dict(trained)
    together = [
        rest.pop(place)
        if record.accepted and record.kind == LowRank.kind and (place := record.place) in rest
        else record
        for record in known
    ]
    return [*together, *rest.values()]


def _tensors(plan: Plan, changes: Changes) -> dict[str, Tensor]:
    """Of every accepted correction, float32 in the CPU's memory, as `corrections.safetensors` names
    them."""
    tensors: dict[str, Tensor] = {}
    for record in plan.corrections:
        if record.accepted:
            (change,) = (change for change in changes[record.place] if change.kind == record.kind)
            tensors |= record.stored(change.tensors)
    return {name: tensor.float().cpu() for name, tensor in tensors.items()}
