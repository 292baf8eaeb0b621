"""A plan, and texts to train on, become a better plan: training after pruning, as a stage of its
own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gradmap.common.distributed import process_group
from gradmap.common.errors import UserError
from gradmap.common.files import sha256_json
from gradmap.common.finite import require_finite_weights
from gradmap.common.flags import flag_of
from gradmap.common.outputs import output_directory
from gradmap.common.processes import is_main_process, process_count
from gradmap.data.calibration import Calibration
from gradmap.data.mixture import Samples
from gradmap.healing.healed_plan import drawn_before, healed_plan
from gradmap.healing.kept_training import KeptTraining
from gradmap.healing.options import HealOptions
from gradmap.healing.sharding import FixedBatches, share_weights
from gradmap.healing.students import FullRankStudent, LowRankStudent, Student
from gradmap.healing.tracking import require_trackers, tracking
from gradmap.healing.trainer import Trainer
from gradmap.healing.written import written_documents
from gradmap.methods.compensation import Pruned
from gradmap.model.architectures import architecture_of
from gradmap.model.batching import Batches, forward_batch
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.corrections import Changes
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import (
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    stored_dtype,
)
from gradmap.model.precision import computing_in
from gradmap.pruning.checks import require_positions
from gradmap.pruning.plan import (
    PLAN_FILE,
    Plan,
    added_up,
    load_calibration_ids,
    load_changes,
    load_plan,
    require_same_model,
    save_plan,
)
from gradmap.pruning.prune import StageCosts


def heal(
    checkpoint: Checkpoint,
    plan_directory: Path,
    options: HealOptions,
    out: Path,
    resume: bool | None = None,
) -> Plan:
    """Trains what is left of a pruned model, and writes the plan directory `out`.
    Raises UserError on bad input, and where training diverges.

    resume: whether to go on with an interrupted run; None does so if its inputs were the same.
    """
    require_trackers(options.track)
    plan = load_plan(plan_directory)
    require_same_model(plan, checkpoint)
    changes = load_changes(plan_directory, plan)
    _require_work_for_all(options)
    _require_positions(checkpoint, options)
    key = _key(checkpoint, plan, plan_directory, options)
    with output_directory(out, PLAN_FILE) if is_main_process() else nullcontext():
        tokenizer = load_tokenizer(checkpoint.directory)
        written = written_documents(checkpoint, options, tokenizer)
        samples = options.mixture.open(tokenizer, written)
        before = drawn_before(plan, plan_directory, options)
        samples.skip(before)
        kept = KeptTraining(out, key | {"the texts": samples.sha256_of_texts})
        costs = StageCosts()
        work = Work(checkpoint, plan, changes, samples, before, options)
        healed, together = _heal(work, kept, resume, costs)
        healed = healed.model_copy(
            update={
                "timings_s": added_up(plan.timings_s, costs.timings_s),
                "peak_gpu_bytes": plan.peak_gpu_bytes | costs.peak_gpu_bytes,
            }
        )
        if is_main_process():
            ids = load_calibration_ids(plan_directory, plan)
            healed = save_plan(out, healed, together, ids)
            kept.remove()
    return healed


def _require_work_for_all(options: HealOptions) -> None:
    count, samples = process_count(), options.samples_in_step
    if samples < count:
        raise UserError(
            f"A step of {samples} samples cannot be shared by {count} processes; give "
            f"--step-tokens {count * options.tokens} or more."
        )
    if options.writer == "vllm" and count > 1:
        raise UserError(
            "vLLM is not started among several processes; run the command in one first, until "
            "training begins: what was written is kept, and read by all of them."
        )
    if not options.shard:
        return
    if count == 1:
        raise UserError(
            "--shard shares weights among several processes; start them (docs/scaling-out.md), or "
            "leave it out."
        )
    if samples % count or options.held_out % count:
        raise UserError(
            f"With --shard every process has as much to do: steps of {samples} samples "
            f"(--step-tokens / --tokens) and {options.held_out} --held-out samples are not "
            f"multiples of {count} processes."
        )


def _require_positions(checkpoint: Checkpoint, options: HealOptions) -> None:
    require_positions(checkpoint, options.tokens)
    positions = checkpoint.positions
    answers = options.chat and options.written is not None
    if answers and positions is not None and 2 * options.tokens > positions:
        raise UserError(
            f"A question and its answer may have {2 * options.tokens} tokens together, and "
            f"{checkpoint.name} takes {positions}; lower --tokens to {positions // 2}."
        )


def _key(
    checkpoint: Checkpoint, plan: Plan, plan_directory: Path, options: HealOptions
) -> dict[str, Any]:
    """What training depends on, texts aside."""
    return {
        f"the model ({checkpoint.name})": sha256_json(checkpoint.file_hashes),
        f"the plan ({plan_directory})": sha256_json(plan.model_dump(mode="json")),
        "the version of gradmap": version("gradmap"),
        **{flag_of(name): value for name, value in options.of_training.items()},
        "--dtype": resolve_dtype(options.dtype, resolve_device(options.device), checkpoint),
    }


@dataclass(frozen=True)
class Work:
    """What is to be done. changes: the plan's; drawn_before: by the healings before it."""

    checkpoint: Checkpoint
    plan: Plan
    changes: Changes
    samples: Samples
    drawn_before: int
    options: HealOptions


def _heal(
    work: Work, kept: KeptTraining, resume: bool | None, costs: StageCosts
) -> tuple[Plan, Changes]:
    options, dtype = work.options, kept.key["--dtype"]
    device = torch.device(resolve_device(options.device))
    # what is shared need not have room on one device
    network = load_model(work.checkpoint, dtype, "cpu" if options.shard else str(device))
    require_finite_weights(network.named_parameters())
    model = LayeredModel(network, architecture_of(work.checkpoint.config))
    with (
        process_group(device),
        computing_in(dtype, network),
        costs.measured("heal", device),
    ):
        trainer = _trainer(work, model, device)
        kept.restore(trainer, resume)
        from_tokens = trainer.tokens + 1 if trainer.progress.steps else 0
        with tracking(options.track, kept.out, from_tokens) as track:
            trainer.run(kept.keep, track)
        return healed_plan(work.plan, work.changes, trainer, work.drawn_before)


def _trainer(work: Work, model: LayeredModel, device: torch.device) -> Trainer:
    options, held_out = work.options, work.samples.held_out
    calibration = Calibration("", options.seed, held_out, work.samples.bos, held_out=len(held_out))
    kind = FixedBatches if options.shard else Batches
    batches = kind(forward_batch(held_out, device))
    pruned = Pruned(model, calibration, tuple(work.plan.removal_order), batches)
    student = student_of(pruned, work.changes, options, _dtype_of_updates(work.checkpoint))
    if options.shard:
        share_weights(model, device)
    return Trainer(pruned, student, work.samples, options)


def student_of(
    pruned: Pruned, changes: Changes, options: HealOptions, updates_in: torch.dtype
) -> Student:
    """Of what is left. It goes on from what the plan has of its kind."""
    model, left = pruned.model, pruned.kept
    if options.train == "full":
        return FullRankStudent(model, left, changes, updates_in)
    generator = torch.Generator().manual_seed(options.seed)
    return LowRankStudent.begin(model, left, changes, options.rank, generator)


def _dtype_of_updates(checkpoint: Checkpoint) -> torch.dtype:
    """An update is far smaller than its weight: in bfloat16 it loses nothing that a weight in half
    precision could hold."""
    wide = stored_dtype(checkpoint.config) in ("float32", "float64")
    return torch.float32 if wide else torch.bfloat16
