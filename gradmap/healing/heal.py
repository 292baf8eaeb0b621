"""A plan, and texts to train on, become a better plan: training after pruning, as a stage of its
own."""

from __future__ import annotations

from contextlib import nullcontext
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
from gradmap.healing.healed_plan import healed_plan
from gradmap.healing.kept_training import KeptTraining
from gradmap.healing.options import HealOptions
from gradmap.healing.trainer import Trainer
from gradmap.healing.written import written_documents
from gradmap.methods.compensation import Pruned
from gradmap.model.architectures import architecture_of
from gradmap.model.batching import Batches, forward_batch
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.corrections import Changes, LowRank, Place, untrained_low_rank
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
from gradmap.model.precision import computing_in
from gradmap.pruning.plan import (
    PLAN_FILE,
    Plan,
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
    """Trains low-rank corrections beside those of a plan, and writes the plan directory `out`.
    Raises UserError on bad input, and where training diverges.

    resume: whether to go on with an interrupted run; None does so if its inputs were the same.
    """
    plan = load_plan(plan_directory)
    require_same_model(plan, checkpoint)
    changes = load_changes(plan_directory, plan)
    _require_work_for_all(options)
    key = _key(checkpoint, plan, plan_directory, options)
    with output_directory(out, PLAN_FILE) if is_main_process() else nullcontext():
        tokenizer = load_tokenizer(checkpoint.directory)
        written = written_documents(checkpoint, options, tokenizer)
        samples = options.mixture.open(tokenizer, written)
        kept = KeptTraining.beside(out, key | {"the texts": samples.sha256_of_texts})
        costs = StageCosts()
        trainer = _train(checkpoint, plan, changes, samples, options, kept, resume, costs)
        healed, together = healed_plan(plan, changes, trainer, samples)
        healed = healed.model_copy(
            update={
                "timings_s": plan.timings_s | costs.timings_s,
                "peak_gpu_bytes": plan.peak_gpu_bytes | costs.peak_gpu_bytes,
            }
        )
        if is_main_process():
            save_plan(out, healed, together, load_calibration_ids(plan_directory, plan))
            kept.remove()
    return healed


def _require_work_for_all(options: HealOptions) -> None:
    if options.samples_in_step < process_count():
        raise UserError(
            f"A step of {options.samples_in_step} samples cannot be shared by {process_count()} "
            f"processes; give --step-tokens {process_count() * options.tokens} or more."
        )


def _key(
    checkpoint: Checkpoint, plan: Plan, plan_directory: Path, options: HealOptions
) -> dict[str, Any]:
    """What training depends on, texts aside."""
    asked = options.model_dump(mode="json")
    return {
        f"the model ({checkpoint.name})": sha256_json(checkpoint.file_hashes),
        f"the plan ({plan_directory})": sha256_json(plan.model_dump(mode="json")),
        "the version of gradmap": version("gradmap"),
        **{flag_of(name): value for name, value in asked.items()},
        "--dtype": resolve_dtype(options.dtype, resolve_device(options.device), checkpoint),
    }


def _train(
    checkpoint: Checkpoint,
    plan: Plan,
    changes: Changes,
    samples: Samples,
    options: HealOptions,
    kept: KeptTraining,
    resume: bool | None,
    costs: StageCosts,
) -> Trainer:
    dtype = kept.key["--dtype"]
    network = load_model(checkpoint, dtype, options.device)
    require_finite_weights(network.named_parameters())
    model = LayeredModel(network, architecture_of(checkpoint.config))
    held_out = samples.held_out
    calibration = Calibration("", options.seed, held_out, samples.bos, held_out=len(held_out))
    batches = Batches(forward_batch(held_out, model.device))
    pruned = Pruned(model, calibration, tuple(plan.removal_order), batches)
    with (
        process_group(model.device),
        computing_in(dtype, network),
        costs.measured("heal", model.device),
    ):
        factors = factors_to_train(pruned, changes, options)
        trainer = Trainer(pruned, changes, factors, samples, options)
        kept.restore(trainer, resume)
        trainer.run(kept.keep)
    return trainer


def factors_to_train(
    pruned: Pruned, changes: Changes, options: HealOptions
) -> dict[Place, LowRank]:
    """Of every linear map that is left. They go on from those that the plan has."""
    generator = torch.Generator().manual_seed(options.seed)
    factors: dict[Place, LowRank] = {}
    for place, module in pruned.model.linear_maps(pruned.kept):
        known = (change for change in changes.get(place, ()) if isinstance(change, LowRank))
        factors[place] = untrained_low_rank(module, options.rank, generator, next(known, None))
    return factors
