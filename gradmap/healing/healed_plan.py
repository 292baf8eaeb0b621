"""What becomes of a plan that was healed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gradmap.common.reading import checked
from gradmap.healing.options import HealOptions
from gradmap.healing.students import with_trained
from gradmap.healing.trainer import Trainer
from gradmap.methods.compensation import Correction
from gradmap.model.corrections import Changes, Place, Trained
from gradmap.pruning.correction_records import CorrectionRecord
from gradmap.pruning.plan import PLAN_FILE, SCHEMA_VERSION, HealingRecord, Plan


def healed_plan(
    plan: Plan, changes: Changes, trainer: Trainer, before: int
) -> tuple[Plan, Changes]:
    """The plan with what was trained, if it is better than nothing, and its changes.
    changes: the plan's before; before: see `drawn_before`."""
    healing = _describe(trainer, len(plan.removal_order), before)
    untrained, after = healing.curve[0].held_out_divergence, healing.lowest_divergence
    accepted = trainer.pruned.accepts(untrained, after)
    trained = trainer.student.trained()
    records = {
        place: CorrectionRecord.of(Correction(place, change, untrained, after, accepted))
        for place, change in trained.items()
    }
    healed = plan.model_copy(
        update={
            "schema_version": SCHEMA_VERSION,
            "corrections": _together(plan.corrections, records, accepted),
            "healing": [*plan.healing, healing],
        }
    )
    return healed, with_trained(changes, trained) if accepted else changes


def _describe(trainer: Trainer, removed: int, before: int) -> HealingRecord:
    samples = trainer.samples
    return HealingRecord(
        removed=removed,
        recipe=trainer.options.of_training,
        samples=samples.drawn - before,
        drawn_before=before,
        bos=samples.bos,
        sha256=samples.sha256,
        passes=samples.passes,
        curve=trainer.progress.curve,
    )


def drawn_before(plan: Plan, directory: Path, options: HealOptions) -> int:
    """How many samples of just these texts, in this order, the plan was healed on before."""
    known = (
        record.drawn_before + record.samples
        for record in plan.healing
        if checked(HealOptions, record.recipe, directory / PLAN_FILE).drawing == options.drawing
    )
    return max(known, default=0)


def _together(
    known: Sequence[CorrectionRecord], trained: Mapping[Place, CorrectionRecord], accepted: bool
) -> list[CorrectionRecord]:
    """What was trained stands where the plan had its like, which it goes on from. Where it had
    none, factors stand last, and updates first: as in `with_trained`."""
    if not accepted:
        return [*known, *trained.values()]
    rest = dict(trained)
    together = [
        rest.pop(record.place)
        if record.accepted and record.place in rest and record.kind == rest[record.place].kind
        else record
        for record in known
    ]
    updates = [record for record in rest.values() if record.kind == Trained.kind]
    factors = [record for record in rest.values() if record.kind != Trained.kind]
    return [*updates, *together, *factors]
