"""What an artifact has to reproduce: the logits of the base model with the plan applied in
memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.folded_model import finite_logits, fold_and_round, require_exact_fold, stored_dtype
from export.runners.probe_io import decode_greedily, placement_for, transformers_step
from gradmap.common.errors import UserError
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.corrections import Changes
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_model
from gradmap.model.sublayers import Pair

# Safetensors inside; not so named, because vLLM takes every *.safetensors of a directory for
# weights.
PROBE_FILE = "gradmap.probe"
PROBE_SAMPLES = 4
PROBE_TOKENS = 64
GREEDY_TOKENS = 64
# A stored probe keeps this many of the highest logits of each position: a megabyte, whatever the
# vocabulary.
STORED_LOGITS = 32


@dataclass(frozen=True)
class Reference:
    """The probe and what is expected of it.

    input_ids: (B, T). logits: (B, T, V) float32, or (B, T, k) where only those of `token_ids` (B,
    T, k) are kept. scale: root mean square of all logits (B, T, V), the unit of relative
    differences. greedy_ids: (G,), the continuation of the first sample; greedy_margins: (G,), by
    how much each led the second best. exact: whether the model's weights were those of the
    artifact, so that rounding them explains no difference.
    """

    input_ids: Tensor
    logits: Tensor
    scale: float
    greedy_ids: Tensor
    greedy_margins: Tensor
    exact: bool = True
    token_ids: Tensor | None = None

    @property
    def best_ids(self) -> Tensor:
        """The most likely token of every position, (B, T)."""
        best = self.logits.argmax(-1)
        if self.token_ids is None:
            return best
        return self.token_ids.gather(-1, best[..., None])[..., 0]

    def at_known_tokens(self, logits: Tensor) -> Tensor:
        """Those of an artifact's logits (B, T, V), or (B, 1, V) of the last position, that the
        reference has: as they are, or (B, T, k) and (B, 1, k)."""
        if self.token_ids is None:
            return logits
        return logits.gather(-1, self.token_ids[:, -logits.shape[1] :])


def random_probe(vocabulary: int) -> Tensor:
    """Token ids (B, T) for a model without calibration samples."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (PROBE_SAMPLES, PROBE_TOKENS), generator=generator)


@torch.inference_mode()
def compute_references(
    checkpoint: Checkpoint,
    removed: tuple[Pair, ...],
    changes: Changes,
    input_ids: Tensor,
    dtypes: Collection[torch.dtype | None],
) -> dict[torch.dtype | None, Reference]:
    """Runs the pruned and corrected model in float32 on the CPU, as a reloaded artifact will be.

    input_ids: (B, T). dtypes: for each of these, one reference with its weights (see
    `fold_and_round`). A model too large for memory is read from disk layer by layer; then weights
    stay as stored, corrections on hooks, and no text is generated. Raises UserError if folding the
    corrections does not compute what they do.
    """
    placement = placement_for(checkpoint.directory)
    if placement:
        reference = _run_from_disk(checkpoint, removed, changes, input_ids, placement)
        alike = () if changes else (None, torch.float32, stored_dtype(checkpoint))
        return {dtype: replace(reference, exact=dtype in alike) for dtype in dtypes}
    if changes:
        require_exact_fold(checkpoint, removed, changes, input_ids)
    return {dtype: _run_folded(checkpoint, removed, changes, input_ids, dtype) for dtype in dtypes}


def save_probe(path: Path, reference: Reference) -> None:
    """Writes the probe with the highest logits of every position, for `gradmap verify`."""
    top = reference.logits.topk(min(STORED_LOGITS, reference.logits.shape[-1]))
    tensors = {
        "input_ids": reference.input_ids.contiguous(),
        "token_ids": top.indices.int(),
        "logits": top.values.contiguous(),
        "scale": torch.tensor(reference.scale, dtype=torch.float64),
        "greedy_ids": reference.greedy_ids,
        "greedy_margins": reference.greedy_margins,
    }
    save_file(tensors, path)


def load_probe(path: Path) -> Reference:
    """Reads a stored probe; raises UserError if it is missing or damaged."""
    try:
        stored = load_file(path)
        return Reference(
            input_ids=stored["input_ids"],
            logits=stored["logits"],
            scale=stored["scale"].item(),
            greedy_ids=stored["greedy_ids"],
            greedy_margins=stored["greedy_margins"],
            token_ids=stored["token_ids"].long(),
        )
    except (FileNotFoundError, SafetensorError, KeyError):
        raise UserError(f"{path} is missing or damaged; export the artifact again.") from None


def _run_folded(
    checkpoint: Checkpoint,
    removed: tuple[Pair, ...],
    changes: Changes,
    input_ids: Tensor,
    dtype: torch.dtype | None,
) -> Reference:
    model = load_model(checkpoint, "float32", "cpu")
    fold_and_round(model, checkpoint, changes, dtype)
    with LayeredModel.of(model).without(removed):
        return _run(model, input_ids, _greedy_tokens(checkpoint.positions, input_ids))


def _run_from_disk(
    checkpoint: Checkpoint,
    removed: tuple[Pair, ...],
    changes: Changes,
    input_ids: Tensor,
    placement: dict[str, Any],
) -> Reference:
    model = load_model(checkpoint, "float32", "cpu", **placement)
    with LayeredModel.of(model).changed(changes, without=removed):
        return _run(model, input_ids, greedy_tokens=0)


def _run(model: Any, input_ids: Tensor, greedy_tokens: int) -> Reference:
    logits = finite_logits(model, input_ids)
    scale = logits.double().square().mean().sqrt().item()
    greedy_ids, margins = decode_greedily(transformers_step(model), input_ids[:1], greedy_tokens)
    return Reference(input_ids, logits, scale, greedy_ids, margins)


def _greedy_tokens(positions: int | None, input_ids: Tensor) -> int:
    """How many are generated behind input_ids (B, T): no more than the model has positions for."""
    if positions is None:
        return GREEDY_TOKENS
    return max(0, min(GREEDY_TOKENS, positions - input_ids.shape[1]))
