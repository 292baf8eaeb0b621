"""By what an artifact is judged: the runners that have it reproduce the reference, and how far they
may be from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from export.comparison import Bounds, LogitComparison
from export.folded_model import stored_dtype
from export.formats.format import Runner
from export.integrity import ArtifactRecord
from export.reference import Reference
from export.tolerance import logit_tolerance, share_of_strays
from export.verification import compare, run_artifact_in_each
from export.writers import Storage, Written
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.configs import hidden_size, layer_count
from gradmap.model.precision import DTYPES


def reference_dtype(storage: Storage, checkpoint: Checkpoint) -> torch.dtype | None:
    """What an artifact's weights are rounded to when they are run in float32; None if each keeps a
    dtype of its own."""
    dtype = storage.torch_dtype or stored_dtype(checkpoint)
    return torch.float32 if dtype == torch.float64 else dtype


def compare_in_each(
    runners: Sequence[Runner],
    directory: Path,
    storage: Storage,
    written: Written,
    reference: Reference,
    quantised: Bounds,
) -> dict[str, LogitComparison]:
    """Runs an artifact in each of its runners, and compares; `require_faithful` and `find_problem`
    judge. quantised: what is asked of a quantised artifact. Returns runner's name -> comparison."""
    outcomes = run_artifact_in_each(runners, directory, reference, written.weight_bytes)
    comparisons = {}
    for runner, outcome in zip(runners, outcomes, strict=True):
        bounds = bounds_of(runner, storage, written, reference, quantised)
        comparisons[runner.name] = compare(reference, outcome, bounds)
    return comparisons


def bounds_of(
    runner: Runner, storage: Storage, written: Written, reference: Reference, quantised: Bounds
) -> Bounds:
    """What an artifact that was just written may differ by in a runner. quantised: if it is."""
    if storage.quantise is not None:
        return quantised
    coarsest = _coarsest_dtype(written)
    named = DTYPES.get(str(written.config.get("dtype")), coarsest)
    compute = torch.float32 if runner.in_float32 else named
    if runner.in_halves and compute == torch.float32:
        compute = torch.float16
    stored = torch.float32 if reference.exact else coarsest
    return _bounds_of_rounding(written.config, compute, stored)


def widest_bounds(record: ArtifactRecord, config: dict[str, Any], min_agreement: float) -> Bounds:
    """What a received artifact may differ by at most, whatever its record allows."""
    if record.quantise is not None:
        return Bounds(min_agreement=min_agreement)
    dtype = DTYPES.get(record.dtype) or DTYPES.get(str(config.get("dtype")), torch.bfloat16)
    return _bounds_of_rounding(config, dtype, dtype)


def _bounds_of_rounding(
    config: dict[str, Any], compute: torch.dtype, stored: torch.dtype
) -> Bounds:
    tolerance = logit_tolerance(layer_count(config), hidden_size(config), compute, stored)
    return Bounds(tolerance, stray_share=share_of_strays(compute, stored))


def _coarsest_dtype(written: Written) -> torch.dtype:
    """The one of the floating-point tensors that rounds the most."""
    dtypes = {tensor.spec.dtype for tensor in written.folded}
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps)
