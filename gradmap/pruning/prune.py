"""Stages 1 and 2 together: a checkpoint becomes a plan directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gradmap.common.console import waiting
from gradmap.common.distributed import process_group
from gradmap.common.environment import describe_environment
from gradmap.common.errors import UserError
from gradmap.common.files import sha256_json
from gradmap.common.finite import require_finite_weights
from gradmap.common.flags import flag_of
from gradmap.common.outputs import output_directory
from gradmap.common.processes import is_main_process
from gradmap.data.calibration import Calibration, build_calibration
from gradmap.methods.base import Method
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.options import MethodOptions
from gradmap.methods.registry import compensator, selector
from gradmap.methods.selection import Selection, Step, Subject, select
from gradmap.model.architectures import architecture_of
from gradmap.model.batching import Batches, forward_batch
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.configs import layer_count
from gradmap.model.corrections import Changes
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
from gradmap.model.precision import computing_in
from gradmap.pruning.budget import samples_within_budget
from gradmap.pruning.checks import check_settings, protected_layers
from gradmap.pruning.correction_records import CorrectionRecord
from gradmap.pruning.journal import Journal
from gradmap.pruning.plan import (
    PLAN_FILE,
    BaseModelIdentity,
    CalibrationRecord,
    Plan,
    StepRecord,
    save_plan,
)
from gradmap.pruning.settings import ALWAYS, OF_SELECTION, PruneSettings

# In a journal's key: an interrupted run goes on with the samples that its budget once gave it.
BUDGET, SAMPLES = "--budget-minutes", "--samples"


def prune(
    checkpoint: Checkpoint, settings: PruneSettings, out: Path, resume: bool | None = None
) -> Plan:
    """Scores, removes, corrects, and writes the plan directory `out`. Raises UserError on bad
    input.

    resume: whether to go on from the journal of an interrupted run; None does so if its inputs were
    the same.
    """
    check_settings(checkpoint, settings)
    with writing_plan(out):
        return _prune(checkpoint, settings, out, resume)


def _prune(checkpoint: Checkpoint, settings: PruneSettings, out: Path, resume: bool | None) -> Plan:
    tokenizer = load_tokenizer(checkpoint.directory)
    samples = settings.samples
    if settings.budget_minutes is not None:
        known = (
            None
            if resume is False
            else Journal.recorded(out, {BUDGET: settings.budget_minutes}, SAMPLES)
        )
        samples = known or samples_within_budget(
            checkpoint, settings, found_dtype(checkpoint, settings)
        )
    drawn = build_calibration(
        tokenizer, settings.calibration, samples, settings.tokens, settings.seed
    )
    calibration = holding_out(drawn, settings.held_out)
    journal = Journal.beside(out, journal_key(checkpoint, settings, calibration))
    done = journal.open(resume)
    plan, changes = make_plan(checkpoint, settings, calibration, done, journal.write)
    if is_main_process():
        save_plan(out, plan, changes, calibration.input_ids)
        journal.remove()
    return plan


def writing_plan(out: Path) -> AbstractContextManager[None]:
    """Holds the place of the plan; of several processes, one writes."""
    return output_directory(out, PLAN_FILE) if is_main_process() else nullcontext()


def holding_out(calibration: Calibration, held_out: int | None) -> Calibration:
    samples = len(calibration.input_ids)
    if held_out is not None and held_out >= samples:
        raise UserError(
            f"--held-out is {held_out} of {samples} samples, which leaves none to fit on; hold out "
            "fewer."
        )
    return replace(calibration, held_out=held_out)


def make_plan(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    calibration: Calibration,
    done: Sequence[Step],
    keep: Callable[[list[Step]], None] = lambda steps: None,
    begun: Callable[[LayeredModel], AbstractContextManager[None]] = lambda model: nullcontext(),
) -> tuple[Plan, Changes]:
    """Both stages: the plan, and the changes that it accepted. done: decisions made before; keep:
    told of all of them after every new one; begun: the model is what it makes of it."""
    dtype = found_dtype(checkpoint, settings)
    network = load_model(checkpoint, dtype, settings.device, streamed=settings.stream)
    require_finite_weights(network.named_parameters())
    _require_known_tokens(calibration, network.config)
    model = LayeredModel(network, architecture_of(checkpoint.config))
    steps = list(done)

    def record(step: Step) -> None:
        steps.append(step)
        keep(steps)

    costs = StageCosts()
    with process_group(model.device), computing_in(dtype, network), begun(model):
        with costs.measured("select", model.device), waiting("Choosing layers"):
            selection = _choose(model, settings, calibration, done, record)
        with costs.measured("compensate", model.device), waiting("Repairing what is left"):
            compensation = _repair(model, settings, calibration, selection)
    plan = _describe_plan(checkpoint, settings, calibration, selection, compensation, costs)
    return plan, compensation.changes


def _choose(
    model: LayeredModel,
    settings: PruneSettings,
    calibration: Calibration,
    done: Sequence[Step],
    record: Callable[[Step], None],
) -> Selection:
    method = selector(settings.selector)
    protected = protected_layers(len(model.layers), settings)
    subject = Subject(
        model, calibration, protected, settings.stream, settings.remove, settings.unit
    )
    return select(
        partial(method.make, subject, *_options(method, settings)),
        subject,
        settings.remove,
        one_shot=settings.at_once,
        done=done,
        record=record,
    )


def _repair(
    model: LayeredModel, settings: PruneSettings, calibration: Calibration, selection: Selection
) -> Compensation:
    method, ids = compensator(settings.compensator), calibration.input_ids
    # streamed, each pass reads every layer once, so that all samples go at once
    batches = Batches(len(ids) if settings.stream else forward_batch(ids, model.device))
    accept_all = settings.accept == ALWAYS
    pruned = Pruned(model, calibration, selection.removal_order, batches, accept_all)
    return method.run(pruned, *_options(method, settings))


def _options(method: Method, settings: PruneSettings) -> tuple[MethodOptions, ...]:
    """The options that the method takes beside what it works on."""
    options = settings.options_of(method.options)
    return () if options is None else (options,)


def _require_known_tokens(calibration: Calibration, config: Any) -> None:
    """Raises UserError if the model has no such tokens."""
    highest = int(calibration.input_ids.max())
    if highest >= config.vocab_size:
        raise UserError(
            f"The tokenizer makes token {highest}, but the model knows only {config.vocab_size}: "
            "it is another model's."
        )


def found_dtype(checkpoint: Checkpoint, settings: PruneSettings) -> str:
    """What this machine computes in: `auto` is not the same everywhere."""
    return resolve_dtype(settings.dtype, resolve_device(settings.device), checkpoint)


def journal_key(
    checkpoint: Checkpoint, settings: PruneSettings, calibration: Calibration
) -> dict[str, Any]:
    """What the removal order depends on. The number of layers does not count where a longer order
    begins like a shorter one."""
    names = [*OF_SELECTION, "held_out", "budget_minutes"]
    names += ["remove"] if settings.at_once else []
    asked = settings.model_dump(mode="json")
    options = {flag_of(name): asked[name] for name in names}
    return {
        f"the model ({checkpoint.name})": sha256_json(checkpoint.file_hashes),
        "the version of gradmap": version("gradmap"),
        "the calibration samples": calibration.sha256,
        "--dtype": found_dtype(checkpoint, settings),
        SAMPLES: len(calibration.input_ids),
        **options,
    }


@dataclass(frozen=True)
class StageCosts:
    """What each stage took: seconds, and on GPUs the most memory that torch had on all of them,
    model included."""

    timings_s: dict[str, float] = field(default_factory=dict)
    peak_gpu_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def measured(self, stage: str, device: torch.device) -> Iterator[None]:
        gpus = range(torch.cuda.device_count()) if device.type == "cuda" else range(0)
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        started = time.monotonic()
        yield
        self.timings_s[stage] = round(time.monotonic() - started, 3)
        if gpus:
            self.peak_gpu_bytes[stage] = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)


def _describe_plan(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    calibration: Calibration,
    selection: Selection,
    compensation: Compensation,
    costs: StageCosts,
) -> Plan:
    samples, tokens = calibration.input_ids.shape
    return Plan(
        base_model=BaseModelIdentity(
            name=checkpoint.name,
            model_type=checkpoint.config["model_type"],
            layers=layer_count(checkpoint.config),
            files=checkpoint.file_hashes,
        ),
        recipe=settings.model_dump(),
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
        steps=[
            StepRecord(scores=step.scores, removed=list(step.removed)) for step in selection.steps
        ],
        drift=dict(compensation.drift),
        corrections=[CorrectionRecord.of(correction) for correction in compensation.corrections],
        environment=describe_environment() | {"dtype": found_dtype(checkpoint, settings)},
        timings_s=costs.timings_s,
        peak_gpu_bytes=costs.peak_gpu_bytes,
    )


def summarise(plan: Plan) -> list[tuple[str, Any]]:
    """Rows of the table that `gradmap prune` prints."""
    rows: list[tuple[str, Any]] = [
        ("layers", f"{plan.base_model.layers} -> {len(plan.kept_layers)}"),
        ("removed, in order", ", ".join(map(str, plan.removal_order))),
        ("calibration samples", _describe_samples(plan)),
    ]
    rows += [("repair", group.describe()) for group in plan.correction_groups]
    rows += [(f"{stage} time", f"{seconds:.1f} s") for stage, seconds in plan.timings_s.items()]
    rows += [
        (f"{stage} GPU memory", f"{peak / 1e9:.1f} GB")
        for stage, peak in plan.peak_gpu_bytes.items()
    ]
    return rows


def _describe_samples(plan: Plan) -> str:
    asked, minutes = plan.recipe["samples"], plan.recipe["budget_minutes"]
    used = plan.calibration.samples
    return (
        str(used)
        if minutes is None
        else f"{used} of {asked}, within a budget of {minutes:g} minutes"
    )
