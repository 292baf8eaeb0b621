"""What becomes of a plan that was healed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradmap.data.mixture import Samples
from gradmap.healing.trainer import Trainer, with_low_rank
from gradmap.methods.compensation import Correction
from gradmap.model.corrections import Changes, LowRank, Place
from gradmap.pruning.correction_records import CorrectionRecord
from gradmap.pruning.plan import SCHEMA_VERSION, HealingRecord, Plan


def healed_plan(
    plan: Plan, changes: Changes, trainer: Trainer, samples: Samples
) -> tuple[Plan, Changes]:
    """The plan with the best that was trained, if it is better than nothing, and its changes.
    changes: the plan's before."""
    healing = _describe(trainer, samples)
    before, after = healing.curve[0].held_out_divergence, healing.lowest_divergence
    accepted = trainer.pruned.accepts(before, after)
    best = trainer.best_factors
    trained = {
        place: CorrectionRecord.of(Correction(place, factor, before, after, accepted))
        for place, factor in best.items()
    }
    healed = plan.model_copy(
        update={
            "schema_version": SCHEMA_VERSION,
            "corrections": _together(plan.corrections, trained, accepted),
            "healing": [*plan.healing, healing],
        }
    )
    return healed, with_low_rank(changes, best) if accepted else changes


def _describe(trainer: Trainer, samples: Samples) -> HealingRecord:
    return HealingRecord(
        recipe=trainer.options.of_training,
        samples=samples.drawn,
        bos=samples.bos,
        sha256=samples.sha256,
        passes=samples.passes,
        curve=trainer.progress.curve,
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
        rest.pop(record.place)
        if record.accepted and record.kind == LowRank.kind and record.place in rest
        else record
        for record in known
    ]
    return [*together, *rest.values()]
