"""Plans that begin with another one: with its choice, for fewer layers, or with the model that it
makes, to remove more.

What is removed from a model that was repaired and healed is chosen with its corrections in place,
and repaired on top of them. To the methods that model is the dense one: its layers are numbered
anew, and repairs bring the rest nearer to what it does. The plan is of the base model all the same,
and healing it has that for a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from gradmap.common.errors import UserError
from gradmap.common.files import sha256_json
from gradmap.common.processes import is_main_process
from gradmap.common.reading import checked
from gradmap.data.calibration import Calibration
from gradmap.methods.registry import selector
from gradmap.methods.selection import Step
from gradmap.model.architectures import Architecture, architecture_of
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.corrections import HIDDEN_STATE, Changes, Place, followed_by
from gradmap.model.folding import fold_into
from gradmap.model.layered import LayeredModel
from gradmap.model.sublayers import Pair, Part, Sublayer, originals
from gradmap.pruning.checks import check_settings
from gradmap.pruning.correction_records import CorrectionRecord
from gradmap.pruning.journal import Journal
from gradmap.pruning.plan import (
    PLAN_FILE,
    SCHEMA_VERSION,
    Plan,
    StepRecord,
    added_up,
    load_calibration_ids,
    load_changes,
    load_plan,
    require_same_model,
    save_plan,
)
from gradmap.pruning.presets import settle
from gradmap.pruning.prune import holding_out, journal_key, make_plan, prune, writing_plan
from gradmap.pruning.settings import OF_REPAIR, PruneOptions, PruneSettings


def prune_as_asked(
    checkpoint: Checkpoint,
    options: PruneOptions,
    out: Path,
    from_plan: Path | None = None,
    resume: bool | None = None,
) -> Plan:
    """What `gradmap prune` does: `prune`, or `prune_from_plan` where there is one to begin with."""
    settings = settle(options, checkpoint.config, from_plan)
    if from_plan is None:
        return prune(checkpoint, settings, out, resume)
    return prune_from_plan(checkpoint, from_plan, settings, out, resume)


def prune_from_plan(
    checkpoint: Checkpoint,
    plan_directory: Path,
    wanted: PruneSettings,
    out: Path,
    resume: bool | None = None,
) -> Plan:
    """Writes the plan directory `out`. For as many layers as the known plan removes, or fewer, its
    first removals are taken, for they are nested, and corrections are computed anew; for more, it
    is gone on from.

    wanted: how many layers, and how to repair; the rest is as it was for the known plan. resume: as
    for `prune`, where more layers are chosen. Raises UserError if that is another model's, or
    cannot be gone on from.
    """
    known = load_plan(plan_directory)
    require_same_model(known, checkpoint)
    recipe = checked(PruneSettings, known.recipe, plan_directory / PLAN_FILE)
    settings = recipe.model_copy(update={name: getattr(wanted, name) for name in OF_REPAIR})
    check_settings(checkpoint, settings)
    record, input_ids = known.calibration, load_calibration_ids(plan_directory, known)
    drawn = Calibration(record.source, record.seed, input_ids, record.bos)
    task = _Task(checkpoint, plan_directory, known, settings, holding_out(drawn, settings.held_out))
    journal = Journal.beside(out, task.key)
    with writing_plan(out):
        more = settings.remove > len(known.removal_order)
        plan, changes = _prune_more(task, journal, resume) if more else _prune_less(task)
        if is_main_process():
            save_plan(out, plan, changes, input_ids)
        if is_main_process() and more:
            journal.remove()
    return plan


@dataclass(frozen=True)
class _Task:
    """known: the plan in `directory`; settings: of the one to make."""

    checkpoint: Checkpoint
    directory: Path
    known: Plan
    settings: PruneSettings
    calibration: Calibration

    @property
    def key(self) -> dict[str, Any]:
        """What the journal's decisions depend on."""
        of_plan = {f"the plan ({self.directory})": sha256_json(self.known.model_dump(mode="json"))}
        return journal_key(self.checkpoint, self.settings, self.calibration) | of_plan


def _prune_less(task: _Task) -> tuple[Plan, Changes]:
    known, settings = task.known, task.settings
    fewer = settings.remove < len(known.removal_order)
    if fewer and not selector(settings.selector).nested:
        raise UserError(
            f"--selector {settings.selector} chooses {settings.remove} layers otherwise than "
            f"{len(known.removal_order)}, so that the plan in {task.directory} does not hold that "
            f"choice; prune again with --remove {settings.remove}."
        )
    steps = [Step(step.scores, tuple(step.removed)) for step in known.steps]
    return make_plan(task.checkpoint, settings, task.calibration, steps)


def _prune_more(task: _Task, journal: Journal, resume: bool | None) -> tuple[Plan, Changes]:
    architecture = architecture_of(task.checkpoint.config)
    earlier = Earlier(task.known, load_changes(task.directory, task.known), architecture)
    earlier.require_possible(task.directory, task.settings)
    more = task.settings.remove - len(task.known.removal_order)
    later, changes = make_plan(
        task.checkpoint,
        task.settings.model_copy(update={"remove": more}),
        task.calibration,
        journal.open(resume),
        journal.write,
        earlier.made_of,
    )
    return earlier.gone_on_with(later, changes, task.settings)


@dataclass(frozen=True)
class Earlier:
    """A plan that is gone on from, and its changes."""

    plan: Plan
    changes: Changes
    architecture: Architecture

    def require_possible(self, directory: Path, settings: PruneSettings) -> None:
        """Raises UserError if it cannot be."""
        if settings.layers:
            raise UserError(
                f"The layers of {directory} were named (--selector {settings.selector}), so that "
                "there is nobody to choose more; name all of them for a plan of its own."
            )
        if any(place.target == HIDDEN_STATE for place in self.changes):
            raise UserError(
                f"The plan in {directory} patches the hidden state, which no weight can hold, so "
                "that it cannot be gone on from; repair it with another --compensator."
            )
        if settings.stream and self.changes:
            raise UserError(
                f"The plan in {directory} was made with --stream, and has corrections that the "
                "layers on disk lack; export it, and prune the artifact."
            )

    @contextmanager
    def made_of(self, model: LayeredModel) -> Iterator[None]:
        """The model is what the plan makes of it."""
        fold_into(model, self.changes)
        with model.without(self.plan.removal_order):
            yield

    def gone_on_with(
        self, later: Plan, changes: Changes, settings: PruneSettings
    ) -> tuple[Plan, Changes]:
        """The plan and its changes for both together. later: the plan, and changes, of what this
        one makes, with layers as they are numbered there."""
        names = _Names(
            self.architecture, originals(self.plan.base_model.layers, self.plan.removal_order)
        )
        removed = [names.pair(pair) for pair in later.removal_order]
        gone = set(chain.from_iterable(removed))

        def stays(place: Place) -> bool:
            return self.architecture.sublayer_of(*place) not in gone

        corrections = [
            *(made for made in self.plan.corrections if stays(made.place)),
            *map(names.correction, later.corrections),
        ]
        before = {place: of_place for place, of_place in self.changes.items() if stays(place)}
        made_since = [
            (names.place(place), change) for place, each in changes.items() for change in each
        ]
        plan = self.plan.model_copy(
            update={
                "schema_version": SCHEMA_VERSION,
                "recipe": settings.model_dump(),
                "calibration": later.calibration,
                "removal_order": [*self.plan.removal_order, *removed],
                "steps": [*self.plan.steps, *map(names.step, later.steps)],
                "drift": {names.ffn(layer): drift for layer, drift in later.drift.items()},
                "corrections": corrections,
                "environment": later.environment,
                "timings_s": added_up(self.plan.timings_s, later.timings_s),
                "peak_gpu_bytes": self.plan.peak_gpu_bytes | later.peak_gpu_bytes,
            }
        )
        return plan, followed_by(before, made_since)


@dataclass(frozen=True)
class _Names:
    """What is called by the layers of a pruned model, as the base model calls it."""

    architecture: Architecture
    original: Mapping[Sublayer, Sublayer]

    def pair(self, pair: Pair) -> Pair:
        return Pair(self.original[pair.first], self.original[pair.second])

    def ffn(self, layer: int) -> int:
        return self.original[Sublayer(layer, Part.FFN)].layer

    def place(self, place: Place) -> Place:
        return Place(self.original[self.architecture.sublayer_of(*place)].layer, place.target)

    def correction(self, made: CorrectionRecord) -> CorrectionRecord:
        return made.model_copy(update={"layer": self.place(made.place).layer})

    def step(self, step: StepRecord) -> StepRecord:
        scores = {self.pair(pair): score for pair, score in step.scores.items()}
        return StepRecord(scores=scores, removed=[self.pair(pair) for pair in step.removed])
