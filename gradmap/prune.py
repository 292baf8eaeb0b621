"""Stages 1 and 2 together: a checkpoint becomes a plan directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradmap.architectures import architecture_of, layer_count
from gradmap.batching import Batches, forward_batch
from gradmap.budget import samples_within_budget
from gradmap.calibration import Calibration, build_calibration
from gradmap.checkpoint import Checkpoint, load_model, load_tokenizer, resolve_device, resolve_dtype
from gradmap.compensation import Compensation, Correction, ProjectionOptions, Pruned
from gradmap.compensators import COMPENSATORS
from gradmap.console import waiting
from gradmap.distributed import process_group
from gradmap.environment import describe_environment
from gradmap.errors import UserError
from gradmap.files import refuse_foreign_directory, sha256_json
from gradmap.journal import Journal
from gradmap.plan import (
    PLAN_FILE,
    BaseModelIdentity,
    CalibrationRecord,
    CorrectionRecord,
    Plan,
    StepRecord,
    load_calibration_ids,
    load_plan,
    require_same_model,
    save_plan,
)
from gradmap.precision import computing_in
from gradmap.processes import is_main_process
from gradmap.selection import Selection, Step, Subject, select
from gradmap.selectors import SELECTORS

# best: what did best in our own comparison. gradmap: the method as it was published.
DEFAULT_PRESET = "best"
PRESETS = {"best": ("repair", "distil"), "gradmap": ("gradient", "projection")}

# What a plan that is made from a larger one may have differently.
REPAIR_SETTINGS = ("remove", "compensator", "device", "top_z", "side", "target", "unregularised")
# In a journal's key: an interrupted run goes on with the samples that its budget once gave it.
BUDGET, SAMPLES = "--budget-minutes", "--samples"
# Repairs that need no linear map behind which nothing follows but the addition to the hidden state.
ANYWHERE = ("none", "distil", "mka", "gradpruner", "linear-patch")
# Methods that change or differentiate every weight, so that all must be in memory.
IN_MEMORY = ("distil", "mka", "gradpruner")


@dataclass(frozen=True)
class PruneSettings:
    """How to prune. remove: number of layers K; samples x tokens: size of the calibration set, a BOS token included.

    layers: the order of removal, for selector manual. protect_first, protect_last: so many layers at either end stay.
    top_z, side, target, unregularised: see ProjectionOptions. stream: read layers from disk one at a time, for a model
    that is larger than memory. budget_minutes: fewer samples are used if all would take longer on this machine.
    """

    remove: int
    calibration: str
    selector: str
    compensator: str
    one_shot: bool = False
    layers: list[int] = field(default_factory=list)
    protect_first: int = 0
    protect_last: int = 0
    top_z: int = 1
    side: str = "left"
    target: str = "down"
    unregularised: bool = False
    samples: int = 128
    tokens: int = 128
    seed: int = 42
    dtype: str = "auto"
    device: str = "auto"
    stream: bool = False
    budget_minutes: float | None = None

    @property
    def projection(self) -> ProjectionOptions:
        return ProjectionOptions(self.top_z, self.side, self.target, self.unregularised)


def prune(checkpoint: Checkpoint, settings: PruneSettings, out: Path, resume: bool | None = None) -> Plan:
    """Scores, removes, corrects, and writes the plan directory `out`. Raises UserError on bad input.

    resume: whether to go on from the journal of an interrupted run; None does so if its inputs were the same.
    """
    check_settings(checkpoint, settings)
    refuse_foreign_directory(out, PLAN_FILE)
    tokenizer = load_tokenizer(checkpoint.directory)
    samples = settings.samples
    if settings.budget_minutes is not None:
        known = None if resume is False else Journal.recorded(out, {BUDGET: settings.budget_minutes}, SAMPLES)
        samples = known or samples_within_budget(checkpoint, settings, found_dtype(checkpoint, settings))
    calibration = build_calibration(tokenizer, settings.calibration, samples, settings.tokens, settings.seed)
    journal = Journal.beside(out, journal_key(checkpoint, settings, calibration))
    done = journal.open(resume)
    plan = _make_plan(checkpoint, settings, calibration, out, done, journal.write)
    if is_main_process():
        journal.remove()
    return plan


def prune_less(checkpoint: Checkpoint, plan_directory: Path, wanted: PruneSettings, out: Path) -> Plan:
    """Makes the plan for fewer layers out of one for more: removals are nested, corrections are computed anew.

    wanted: how many layers, how to repair, and on which device; the rest is as it was for the larger plan. Raises
    UserError if that is another model's or has fewer layers.
    """
    larger = load_plan(plan_directory)
    require_same_model(larger, checkpoint)
    if not 1 <= wanted.remove <= len(larger.removal_order):
        raise UserError(
            f"The plan in {plan_directory} removes {len(larger.removal_order)} layers, so that --remove cannot be "
            f"{wanted.remove}; give 1 to {len(larger.removal_order)}."
        )
    settings = PruneSettings(**(larger.recipe | {name: getattr(wanted, name) for name in REPAIR_SETTINGS}))
    check_settings(checkpoint, settings)
    refuse_foreign_directory(out, PLAN_FILE)
    record, input_ids = larger.calibration, load_calibration_ids(plan_directory, larger)
    calibration = Calibration(record.source, record.seed, input_ids, record.bos)
    steps = [Step(step.scores, tuple(step.removed)) for step in larger.steps]
    return _make_plan(checkpoint, settings, calibration, out, steps, lambda steps: None)


def _make_plan(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    calibration: Calibration,
    out: Path,
    done: list[Step],
    keep: Callable[[list[Step]], None],
) -> Plan:
    """Both stages. done: decisions made before; keep: told of all of them after every new one."""
    architecture = architecture_of(checkpoint.config)
    dtype = found_dtype(checkpoint, settings)
    model = load_model(checkpoint, dtype, settings.device, streamed=settings.stream)
    steps = list(done)

    def record(step: Step) -> None:
        steps.append(step)
        keep(steps)

    timings_s: dict[str, float] = {}
    with process_group(model.device), computing_in(dtype, model):
        with _timed(timings_s, "select"), waiting("Choosing layers"):
            subject = Subject(
                model, architecture, calibration, _ends(checkpoint, settings), settings.stream, tuple(settings.layers)
            )
            selection = select(
                SELECTORS[settings.selector],
                subject,
                settings.remove,
                one_shot=settings.one_shot,
                done=done,
                record=record,
            )
        with _timed(timings_s, "compensate"), waiting("Repairing what is left"):
            # streamed, each pass reads every layer once, so that all samples go at once
            ids = calibration.input_ids
            batches = Batches(len(ids) if settings.stream else forward_batch(ids, model.device))
            compensation = COMPENSATORS[settings.compensator](
                Pruned(model, architecture, calibration, selection.removal_order, batches, settings.projection)
            )
    plan = _describe_plan(checkpoint, settings, calibration, selection, compensation, timings_s)
    tensors = {
        f"{record.name}.{name}": tensor.float().cpu()
        for record, correction in zip(plan.corrections, compensation.corrections, strict=True)
        if record.accepted
        for name, tensor in correction.change.tensors.items()
    }
    if is_main_process():
        save_plan(out, plan, tensors, calibration.input_ids)
    return plan


def found_dtype(checkpoint: Checkpoint, settings: PruneSettings) -> str:
    """What this machine computes in: `auto` is not the same everywhere."""
    return resolve_dtype(settings.dtype, resolve_device(settings.device), checkpoint)


def journal_key(checkpoint: Checkpoint, settings: PruneSettings, calibration: Calibration) -> dict[str, Any]:
    """What the removal order depends on. The number of layers does not count: a longer order begins like a shorter."""
    names = ["selector", "layers", "protect_first", "protect_last", "one_shot", "budget_minutes"]
    names += ["remove"] if settings.one_shot else []
    options = {f"--{name.replace('_', '-')}": getattr(settings, name) for name in names}
    return {
        f"the model ({checkpoint.name})": sha256_json(checkpoint.file_hashes),
        "the calibration samples": calibration.sha256,
        "--dtype": found_dtype(checkpoint, settings),
        SAMPLES: len(calibration.input_ids),
        **options,
    }


def choose_methods(
    preset: str | None, selector: str | None, compensator: str | None, from_plan: Path | None
) -> tuple[str, str]:
    """The selector and the compensator: those that are given, else the preset's, else those of the larger plan."""
    if preset is not None and preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}; known are {', '.join(PRESETS)}.")
    if preset is None and from_plan is not None:
        recipe = load_plan(from_plan).recipe
        return selector or recipe["selector"], compensator or recipe["compensator"]
    default = PRESETS[preset or DEFAULT_PRESET]
    return selector or default[0], compensator or default[1]


def layers_to_remove(config: dict[str, Any], remove: int | None, ratio: float | None) -> int:
    """Returns K from --remove, or from --ratio rounded to whole layers. Exactly one of the two must be given."""
    if (remove is None) == (ratio is None):
        raise UserError("Give either --remove K or --ratio R.")
    if remove is not None:
        return remove
    assert ratio is not None
    if not 0 < ratio < 1:
        raise UserError(f"--ratio is {ratio}; give a share between 0 and 1, such as 0.25.")
    return max(1, round(ratio * layer_count(config)))


def require_removable(remove: int, layers: int, name: str) -> None:
    """Raises UserError if nothing would go, or nothing stay."""
    if not 1 <= remove < layers:
        raise UserError(f"Cannot remove {remove} of the {layers} layers of {name}; remove between 1 and {layers - 1}.")


def check_settings(checkpoint: Checkpoint, settings: PruneSettings) -> None:
    """Raises UserError if the settings do not fit the model."""
    layers = layer_count(checkpoint.config)
    require_removable(settings.remove, layers, checkpoint.name)
    protected = _ends(checkpoint, settings)
    if layers - len(protected) < settings.remove:
        raise UserError(
            f"{len(protected)} of the {layers} layers are protected, so that {settings.remove} cannot be removed; "
            "lower --protect-first, --protect-last or --remove."
        )
    for kind, name, known in (
        ("selector", settings.selector, SELECTORS),
        ("compensator", settings.compensator, COMPENSATORS),
    ):
        if name not in known:
            raise UserError(f"Unknown {kind} {name!r}; known are {', '.join(known)}.")
    uncorrectable = architecture_of(checkpoint.config).uncorrectable
    if uncorrectable is not None and settings.compensator not in ANYWHERE:
        raise UserError(
            f"The down projections of a {checkpoint.config['model_type']} model cannot be fitted in closed form: "
            f"{uncorrectable}; use --compensator distil or none."
        )
    if settings.stream and settings.compensator in IN_MEMORY:
        raise UserError(
            f"--compensator {settings.compensator} needs all weights in memory; leave out --stream, or use sequential."
        )
    if settings.projection != ProjectionOptions() and settings.compensator not in ("projection", "projection-adam"):
        raise UserError(
            "--top-z, --side, --target and --unregularised are for --compensator projection and projection-adam."
        )
    if settings.side not in ("left", "right"):
        raise UserError(f"--side is {settings.side}; give left or right.")
    if bool(settings.layers) != (settings.selector == "manual"):
        raise UserError("--layers is the order of removal for --selector manual; give both, or neither.")


def _ends(checkpoint: Checkpoint, settings: PruneSettings) -> frozenset[int]:
    """The layers that are protected."""
    layers = range(layer_count(checkpoint.config))
    return frozenset((*layers[: settings.protect_first], *layers[len(layers) - settings.protect_last :]))


@contextmanager
def _timed(timings_s: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    timings_s[stage] = round(time.monotonic() - started, 3)


def _describe_plan(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    calibration: Calibration,
    selection: Selection,
    compensation: Compensation,
    timings_s: dict[str, float],
) -> Plan:
    samples, tokens = calibration.input_ids.shape
    return Plan(
        base_model=BaseModelIdentity(
            name=checkpoint.name,
            model_type=checkpoint.config["model_type"],
            layers=layer_count(checkpoint.config),
            files=checkpoint.file_hashes,
        ),
        recipe=asdict(settings),
        calibration=CalibrationRecord(
            source=calibration.source,
            seed=calibration.seed,
            samples=samples,
            tokens=tokens,
            bos=calibration.bos,
            held_out_samples=calibration.held_out_samples,
            sha256=calibration.sha256,
        ),
        removal_order=list(selection.removal_order),
        steps=[StepRecord(scores=step.scores, removed=list(step.removed)) for step in selection.steps],
        drift=dict(compensation.drift),
        corrections=[_describe_correction(correction) for correction in compensation.corrections],
        environment=describe_environment() | {"dtype": found_dtype(checkpoint, settings)},
        timings_s=timings_s,
    )


def _describe_correction(correction: Correction) -> CorrectionRecord:
    return CorrectionRecord(
        layer=correction.place.layer,
        target=correction.place.target,
        kind=correction.change.kind,
        lam=correction.lam,
        relative_lambda=correction.relative_lambda,
        held_out_loss_before=correction.held_out_loss_before,
        held_out_loss_after=correction.held_out_loss_after,
        accepted=correction.accepted,
    )


def summarise(plan: Plan) -> list[tuple[str, Any]]:
    """Rows of the table that `gradmap prune` prints."""
    rows: list[tuple[str, Any]] = [
        ("layers", f"{plan.base_model.layers} -> {len(plan.kept_layers)}"),
        ("removed, in order", ", ".join(map(str, plan.removal_order))),
        ("calibration samples", _describe_samples(plan)),
    ]
    rows += [("repair", repair.describe()) for repair in plan.repairs]
    rows += [(f"{stage} time", f"{seconds:.1f} s") for stage, seconds in plan.timings_s.items()]
    return rows


def _describe_samples(plan: Plan) -> str:
    asked, minutes = plan.recipe["samples"], plan.recipe["budget_minutes"]
    used = plan.calibration.samples
    return str(used) if minutes is None else f"{used} of {asked}, within a budget of {minutes:g} minutes"
