"""Nothing is reported as exported before a fresh process has loaded it and its logits were compared.

The reference is the base model with the plan applied in memory: layers left out, W' multiplied unfolded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradmap.architectures import architecture_of
from gradmap.checkpoint import Checkpoint, load_model
from gradmap.compensation import pruned_and_corrected
from gradmap.errors import UserError

PROBE_SAMPLES = 4
PROBE_TOKENS = 64
# Room for the constants. A structural error (a lost layer, a lost W') changed SmolLM2's logits by 0.3 to 1.0.
SAFETY_FACTOR = 3.0


@dataclass(frozen=True)
class Reference:
    """The probe `input_ids` (B, T) and the logits (B, T, V) float32 that an artifact has to reproduce."""

    input_ids: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Verification:
    """How an artifact's logits compare with the reference. Differences are root mean squares over those of the logits.

    cached_difference: the same for the last position, reached through the KV cache.
    argmax_agreement: share of positions with the same most likely token.
    """

    relative_difference: float
    cached_difference: float
    tolerance: float
    max_absolute_difference: float
    argmax_agreement: float
    probe_samples: int
    probe_tokens: int


@torch.inference_mode()
def compute_reference(
    checkpoint: Checkpoint, removed: tuple[int, ...], matrices: dict[int, Tensor], input_ids: Tensor
) -> Reference:
    """Runs the unfolded compensated model in float32 on the CPU, as the reloaded artifact will be."""
    model = load_model(checkpoint, "float32", "cpu")
    with pruned_and_corrected(model, architecture_of(checkpoint.config), removed, matrices):
        return Reference(input_ids, model(input_ids=input_ids, use_cache=False).logits)


def random_probe(vocabulary: int) -> Tensor:
    """Token ids (B, T) for a model without calibration samples."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (PROBE_SAMPLES, PROBE_TOKENS), generator=generator)


def logit_tolerance(dtype: torch.dtype, layers: int, hidden_size: int) -> float:
    """Largest relative root-mean-square difference of logits that rounding can explain.

    Rounding a weight to `dtype` errs by at most u, uniformly, so by u / sqrt(3) on average; a float32 dot product
    of d terms by about sqrt(d) u_32. Each layer adds two updates, each through two linear maps in a row, so 4 L
    such errors reach the logits, and independent errors add up by the square root of their number.
    """
    rounding = torch.finfo(dtype).eps / 2 / 3**0.5
    arithmetic = hidden_size**0.5 * torch.finfo(torch.float32).eps / 2
    return float(SAFETY_FACTOR * (4 * layers) ** 0.5 * (rounding + arithmetic))


def verify_artifact(directory: Path, reference: Reference, tolerance: float) -> Verification:
    """Reloads an artifact in a fresh process and compares. Raises UserError if it differs by more than `tolerance`."""
    reloaded = _reload(directory, reference.input_ids)
    verification = compare_logits(reference, reloaded["logits"], reloaded["cached_logits"], tolerance)
    worst = max(verification.relative_difference, verification.cached_difference)
    if not worst <= tolerance:  # not: a NaN must fail
        raise UserError(
            f"The exported model's logits differ from the reference by {worst:.2g} (relative), where rounding explains "
            f"{tolerance:.2g}; nothing was written. Export with another dtype, or report this as a bug."
        )
    return verification


def compare_logits(reference: Reference, logits: Tensor, cached_logits: Tensor, tolerance: float) -> Verification:
    expected = reference.logits
    samples, tokens = reference.input_ids.shape
    return Verification(
        relative_difference=_relative_rms(logits, expected),
        cached_difference=_relative_rms(cached_logits, expected[:, -1]),
        tolerance=tolerance,
        max_absolute_difference=(logits - expected).abs().max().item(),
        argmax_agreement=(logits.argmax(-1) == expected.argmax(-1)).double().mean().item(),
        probe_samples=samples,
        probe_tokens=tokens,
    )


def _relative_rms(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).double().norm() / expected.double().norm())


def _reload(directory: Path, input_ids: Tensor) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as temporary:
        probe, out = Path(temporary, "probe.safetensors"), Path(temporary, "logits.safetensors")
        save_file({"input_ids": input_ids.contiguous()}, probe)
        command = [sys.executable, "-m", "export.reload", str(directory.resolve()), str(probe), str(out)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            last_line = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"The exported model does not load in stock transformers: {last_line}")
        return load_file(out)
