"""What a model is worth: perplexity on fixed segments (the paper's protocol), with its standard error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmap.architectures import Architecture, architecture_of
from gradmap.calibration import build_segments, hash_token_ids
from gradmap.checkpoint import Checkpoint, load_model, load_tokenizer
from gradmap.compensation import pruned_and_corrected
from gradmap.console import progress
from gradmap.errors import UserError
from gradmap.files import sha256_file
from gradmap.layerwise import sample_losses
from gradmap.plan import PLAN_FILE, Plan, load_calibration_ids, load_corrections, load_plan, require_same_model
from gradmap.precision import computing_in

BATCH_SIZE = 4
SEGMENT_TOKENS = 128


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Segments:
    """Evaluation text as token ids (S, T); `source` is the SPEC it was cut from."""

    name: str
    source: str
    input_ids: Tensor


@dataclass(frozen=True)
class EvaluationSettings:
    """texts: name -> SPEC; limit: at most so many segments of each; seed: order of the documents."""

    texts: dict[str, str]
    limit: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"


@torch.inference_mode()
def perplexity(model: Any, input_ids: Tensor, description: str) -> Estimate:
    """exp of the mean next-token cross-entropy of segments (S, T).

    Every segment predicts T-1 tokens, so segments are the independent units: the standard error of the mean loss
    over segments, times the perplexity (first-order propagation through exp).
    """
    losses: list[Tensor] = []
    with progress(description, len(input_ids)) as advance:
        for batch in input_ids.split(BATCH_SIZE):
            batch = batch.to(model.device)
            losses.append(sample_losses(model(input_ids=batch, use_cache=False).logits, batch).double().cpu())
            advance(len(batch))
    return perplexity_of_losses(torch.cat(losses) / (input_ids.shape[1] - 1))


def perplexity_of_losses(losses: Tensor) -> Estimate:
    """Perplexity and its standard error from mean losses per segment (S,), nats per token."""
    if not losses.isfinite().all():
        raise UserError("The model's loss is not finite on the evaluation text; the checkpoint is damaged.")
    value = losses.mean().exp().item()
    stderr = value * losses.std().item() / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
    return Estimate(value, stderr)


def evaluate(checkpoint: Checkpoint, settings: EvaluationSettings, plan_directory: Path | None) -> dict[str, Any]:
    """Returns the contents of eval.json: `dense` and, with a plan, `pruned` (the plan applied in memory, W' unfolded).

    Raises UserError if the plan belongs to another model or was calibrated on the evaluation text.
    """
    segments = _read_segments(load_tokenizer(checkpoint), settings)
    plan = None if plan_directory is None else _load_disjoint_plan(plan_directory, checkpoint, segments)
    architecture = architecture_of(checkpoint.config)
    model = load_model(checkpoint, settings.dtype, settings.device)
    result = {"schema_version": 1, "model": checkpoint.name, "texts": _describe_segments(segments)}
    with computing_in(settings.dtype, model):
        result["dense"] = _describe(model, architecture, segments, "dense")
        if plan_directory is not None and plan is not None:
            result["plan_sha256"] = sha256_file(plan_directory / PLAN_FILE)
            corrections = load_corrections(plan_directory, plan)
            with pruned_and_corrected(model, architecture, plan.removal_order, corrections):
                result["pruned"] = _describe(model, architecture, segments, "pruned")
    return result


def _read_segments(tokenizer: Any, settings: EvaluationSettings) -> list[Segments]:
    return [
        Segments(name, source, build_segments(tokenizer, source, SEGMENT_TOKENS, settings.limit, settings.seed))
        for name, source in settings.texts.items()
    ]


def _load_disjoint_plan(directory: Path, checkpoint: Checkpoint, segments: Sequence[Segments]) -> Plan:
    plan = load_plan(directory)
    require_same_model(plan, checkpoint)
    calibration_samples = {tuple(sample) for sample in load_calibration_ids(directory, plan).tolist()}
    for evaluated in segments:
        shared = calibration_samples & {tuple(segment) for segment in evaluated.input_ids.tolist()}
        if shared or evaluated.source == plan.calibration.source:
            raise UserError(f"{evaluated.source} was used for calibration; evaluate on other text.")
    return plan


def _describe(model: Any, architecture: Architecture, segments: Sequence[Segments], label: str) -> dict[str, Any]:
    perplexities = {
        evaluated.name: asdict(perplexity(model, evaluated.input_ids, f"Perplexity of {label} on {evaluated.name}"))
        for evaluated in segments
    }
    return {
        "layers": len(architecture.layer_list(model)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "perplexity": perplexities,
        "accuracy": {},
    }


def _describe_segments(segments: Sequence[Segments]) -> dict[str, Any]:
    """Records what was evaluated on: source, shape and hash of the token ids, by name."""
    return {
        evaluated.name: {
            "source": evaluated.source,
            "segments": evaluated.input_ids.shape[0],
            "tokens": evaluated.input_ids.shape[1],
            "sha256": hash_token_ids(evaluated.input_ids),
        }
        for evaluated in segments
    }
