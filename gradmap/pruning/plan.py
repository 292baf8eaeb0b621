"""The plan: what pruning decided, as files (`plan.json`, `calibration.safetensors`, and those of
gradmap.pruning.plan_tensors).

A plan is megabytes for any model, unless its weights were trained at full rank; with the base
checkpoint it is all that export needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from gradmap.common.errors import UserError
from gradmap.common.files import atomic_directory, write_json
from gradmap.common.reading import Strict, checked, read_json_object
from gradmap.data.calibration import hash_token_ids
from gradmap.model.architectures import architecture_of
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.configs import layer_count
from gradmap.model.corrections import CHANGES, Changes, Place, Trained
from gradmap.model.sublayers import (
    JoinedLayer,
    Pair,
    are_neighbours,
    joined_layers,
    sublayers_left,
)
from gradmap.pruning.correction_records import CorrectionGroup, CorrectionRecord, stored
from gradmap.pruning.plan_tensors import load_tensors, read_changes, write_changes

SCHEMA_VERSION = 8
# One of schema 5 was not healed, one of 6 not at full rank, and one of 7 has one correction of each
# kind and weight at most; they have everything else.
READ_VERSIONS = (5, 6, 7, SCHEMA_VERSION)
PLAN_FILE = "plan.json"
CALIBRATION_FILE = "calibration.safetensors"


class BaseModelIdentity(Strict):
    """Which checkpoint a plan belongs to. files: name -> SHA-256."""

    name: str
    model_type: str
    layers: int
    files: dict[str, str]


class CalibrationRecord(Strict):
    """Where the calibration samples came from; the token ids are in `calibration.safetensors`
    (`input_ids`, (N, T)).

    tokens: T, of which the first is `bos` where the tokenizer puts one in front of a text; else bos
    is null.
    """

    source: str
    seed: int
    samples: int
    tokens: int
    bos: int | None
    held_out_samples: int
    sha256: str


class StepRecord(Strict):
    """One decision: the score of everything that could go, and what it removed."""

    scores: dict[Pair, float]
    removed: list[Pair]


class HealingPoint(Strict):
    """A look at held-out samples in training: behind so many tokens and seconds. Divergences are
    nats per token; training_divergence is the mean since the last look, null at the first."""

    tokens: int
    seconds: float
    training_divergence: float | None
    held_out_divergence: float


class HealingRecord(Strict):
    """One `gradmap heal`, of a model without so many layers; null where an older plan does not
    say.

    recipe: its options; samples: how many it was trained on; drawn_before: how many of the same
    texts the healings before it were, behind which it went on; sha256: of the ids of all of them;
    bos: as for calibration; passes: begun through each text.
    """

    removed: int | None = None
    recipe: dict[str, Any]
    samples: int
    drawn_before: int = 0
    bos: int | None
    sha256: str
    passes: dict[str, int]
    curve: list[HealingPoint]

    @property
    def lowest_divergence(self) -> float:
        return min(point.held_out_divergence for point in self.curve)


class Plan(Strict):
    """The contents of plan.json.

    What is removed is the number of a layer, or M7+A8 for two neighbours that are no layer: the FFN
    of layer 7 and the attention of layer 8. Numbers are the base model's. drift: Eq. 8 behind
    retained layers, by the number of their FFN. trained_files: of what was trained at full rank,
    name -> SHA-256.
    """

    schema_version: int = SCHEMA_VERSION
    base_model: BaseModelIdentity
    recipe: dict[str, Any]
    calibration: CalibrationRecord
    removal_order: list[Pair]
    steps: list[StepRecord]
    drift: dict[int, float]
    corrections: list[CorrectionRecord]
    trained_files: dict[str, str] = Field(default={})
    healing: list[HealingRecord] = Field(default=[])
    environment: dict[str, str]
    timings_s: dict[str, float]
    peak_gpu_bytes: dict[str, int] = Field(default={})

    @property
    def kept_layers(self) -> list[JoinedLayer]:
        """The layers of the pruned model."""
        return joined_layers(self.base_model.layers, self.removal_order)

    @property
    def correction_groups(self) -> list[CorrectionGroup]:
        """The corrections, those that were fitted together as one."""
        together = groupby(
            self.corrections,
            lambda made: (
                made.kind,
                made.held_out_divergence_before,
                made.held_out_divergence_after,
            ),
        )
        return [CorrectionGroup(tuple(corrections)) for _, corrections in together]


def added_up(seconds: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """The time that each stage took, over both."""
    stages = seconds.keys() | more.keys()
    return {stage: round(seconds.get(stage, 0) + more.get(stage, 0), 3) for stage in sorted(stages)}


def save_plan(directory: Path, plan: Plan, changes: Changes, input_ids: Tensor) -> Plan:
    """Writes a plan directory atomically, and returns the plan with its files. changes: of the
    accepted corrections; input_ids: (N, T).

    Raises UserError if a tensor is not finite, or if the plan contradicts itself.
    """
    if problem := _contradiction(plan):
        raise UserError(f"The plan contradicts itself, and is not written: {problem}.")
    with atomic_directory(directory, marker=PLAN_FILE) as partial:
        files = write_changes(partial, plan.corrections, changes)
        plan = plan.model_copy(update={"trained_files": files})
        save_file({"input_ids": input_ids.contiguous()}, partial / CALIBRATION_FILE)
        write_json(partial / PLAN_FILE, plan.model_dump(mode="json"))
    return plan


def load_plan(directory: Path) -> Plan:
    """Reads and checks plan.json; raises UserError if it is missing, of another schema, or
    contradicts itself."""
    contents = read_json_object(directory / PLAN_FILE)
    version = contents.get("schema_version")
    if version not in READ_VERSIONS:
        raise UserError(
            f"{directory} has plan schema {version}, this version reads "
            f"{READ_VERSIONS[0]} to {SCHEMA_VERSION}; prune again."
        )
    plan = checked(Plan, contents, directory / PLAN_FILE)
    if problem := _contradiction(plan):
        raise UserError(f"{directory / PLAN_FILE} contradicts itself: {problem}.")
    return plan


def _contradiction(plan: Plan) -> str | None:
    removed, layers = [pair for step in plan.steps for pair in step.removed], plan.base_model.layers
    if removed != plan.removal_order:
        return "removal_order is not what its steps removed"
    if not are_neighbours(layers, removed) or len(removed) >= layers:
        return (
            "removal_order does not name layers that the base model has, or neighbours in what is "
            "left of it, each once, and leaves some"
        )
    left = {sublayer.layer for sublayer in sublayers_left(layers, removed)}
    if not {made.layer for made in plan.corrections} <= left:
        return "a layer is corrected that is not there"
    divergences = [
        (made.held_out_divergence_before, made.held_out_divergence_after)
        for made in plan.corrections
    ]
    if any((before is None) != (after is None) for before, after in divergences):
        return "a held-out divergence is known before a correction or behind it alone"
    if unknown := {correction.kind for correction in plan.corrections} - CHANGES.keys():
        return f"the kind of correction {unknown.pop()!r} is not known"
    changed: set[Place] = set()
    for correction, name in stored(plan.corrections):
        if correction.kind == Trained.kind and correction.place in changed:
            return f"{name} stands behind other corrections of its weight"
        changed.add(correction.place)
    return None


def load_changes(directory: Path, plan: Plan) -> Changes:
    """Returns every accepted correction, by the weight it changes."""
    return read_changes(directory, plan.corrections, plan.trained_files)


def load_calibration_ids(directory: Path, plan: Plan) -> Tensor:
    """Returns the calibration token ids (N, T) after checking them against the plan's hash."""
    input_ids = load_tensors(directory / CALIBRATION_FILE).get("input_ids")
    if input_ids is None or hash_token_ids(input_ids) != plan.calibration.sha256:
        raise UserError(
            f"{directory / CALIBRATION_FILE} is not what plan.json was made with; prune again."
        )
    return input_ids


def require_same_model(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raises UserError unless the checkpoint's files are, byte for byte, those the plan was made
    for, has as many layers as the plan says, and what is corrected is left."""
    hashes = checkpoint.file_hashes
    for name in sorted(plan.base_model.files.keys() | hashes.keys()):
        if plan.base_model.files.get(name) != hashes.get(name):
            raise UserError(
                f"The plan was made for another model, {plan.base_model.name}: {name} is not that "
                f"of {checkpoint.name}."
            )
    if layer_count(checkpoint.config) != plan.base_model.layers:
        raise UserError(
            f"The plan is for {plan.base_model.layers} layers, which {checkpoint.name} does not "
            "have."
        )
    sublayer_of = architecture_of(checkpoint.config).sublayer_of
    corrected = {sublayer_of(made.layer, made.target) for made in plan.corrections}
    left = sublayers_left(plan.base_model.layers, plan.removal_order)
    if gone := sorted(corrected.difference(left)):
        raise UserError(f"The plan corrects {gone[0].words}, which it removes; prune again.")
