"""What an artifact has to reproduce: the logits of the base model with the plan applied in memory, W' unfolded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from export.runners.probe_io import decode_greedily, placement_for, transformers_step
from gradmap.architectures import Architecture, architecture_of
from gradmap.checkpoint import Checkpoint, load_model
from gradmap.corrections import Changes, pruned_and_corrected
from gradmap.errors import UserError

# Safetensors inside; not so named, because vLLM takes every *.safetensors of a directory for weights.
PROBE_FILE = "gradmap.probe"
PROBE_SAMPLES = 4
PROBE_TOKENS = 64
GREEDY_TOKENS = 64
# A stored probe keeps this many of the highest logits of each position: a megabyte, whatever the vocabulary.
STORED_LOGITS = 32


@dataclass(frozen=True)
class Reference:
    """The probe and what is expected of it.

    input_ids: (B, T). logits: (B, T, V) float32, or (B, T, k) where only those of `token_ids` (B, T, k) are kept.
    scale: root mean square of all logits (B, T, V), the unit of relative differences.
    greedy_ids: (G,), the continuation of the first sample; greedy_margins: (G,), by how much each led the second best.
    exact: whether the model's weights were rounded as the artifact's are, so that rounding explains no difference.
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
        return best if self.token_ids is None else self.token_ids.gather(-1, best[..., None])[..., 0]

    def at_known_tokens(self, logits: Tensor) -> Tensor:
        """Those of an artifact's logits (B, T, V), or (B, 1, V) of the last position, that the reference has."""
        return logits if self.token_ids is None else logits.gather(-1, self.token_ids[:, -logits.shape[1] :])


def random_probe(vocabulary: int) -> Tensor:
    """Token ids (B, T) for a model without calibration samples."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (PROBE_SAMPLES, PROBE_TOKENS), generator=generator)


@torch.inference_mode()
def compute_references(
    checkpoint: Checkpoint,
    removed: tuple[int, ...],
    changes: Changes,
    input_ids: Tensor,
    dtypes: Collection[torch.dtype | None],
) -> dict[torch.dtype | None, Reference]:
    """Runs the unfolded compensated model in float32 on the CPU, as a reloaded artifact will be.

    dtypes: for each of these (None: as stored), one reference with the weights rounded to it; those that
    are corrected are not rounded, since an artifact rounds the corrected ones. A model too large for memory is read
    from disk layer by layer; then weights stay as stored and no text is generated.
    """
    placement = placement_for(checkpoint.directory)
    architecture = architecture_of(checkpoint.config)
    references: dict[torch.dtype | None, Reference] = {}
    model = None
    rounded = False
    for dtype in sorted(dtypes, key=lambda dtype: (dtype is not None, str(dtype))):
        if model is None or rounded:  # rounding twice is not rounding once
            model = load_model(checkpoint, "float32", "cpu", **placement)
        if dtype is not None and not placement:
            _round_parameters(model, architecture, dtype, keep=changes)
            rounded = True
        greedy_tokens = 0 if placement else _greedy_tokens(checkpoint.config, input_ids)
        with pruned_and_corrected(model, architecture, removed, changes):
            references[dtype] = _run(model, input_ids, greedy_tokens, exact=dtype is None or not placement)
    return references


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
    path.write_bytes(save(tensors))  # save_file would hide the file from other users


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


def _run(model: Any, input_ids: Tensor, greedy_tokens: int, exact: bool) -> Reference:
    logits = model(input_ids=input_ids, use_cache=False).logits
    if not logits.isfinite().all():
        raise UserError("The model's logits are not finite; its weights are damaged.")
    greedy_ids, margins = decode_greedily(transformers_step(model), input_ids[:1], greedy_tokens)
    return Reference(input_ids, logits, logits.double().square().mean().sqrt().item(), greedy_ids, margins, exact)


def _round_parameters(model: Any, architecture: Architecture, dtype: torch.dtype, keep: Changes) -> None:
    layers = architecture.layer_list(model)
    kept = {id(weight) for place in keep for weight in architecture.weights_of(layers[place.layer], place.target)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in kept:
            parameter.copy_(parameter.to(dtype))
            if not parameter.isfinite().all():
                raise UserError(f"{name} does not fit in {dtype}; export with --dtype bfloat16 or float32.")


def _greedy_tokens(config: dict[str, Any], input_ids: Tensor) -> int:
    """As many as the model has positions for."""
    positions = int(config.get("max_position_embeddings") or config["n_positions"])
    return max(0, min(GREEDY_TOKENS, positions - input_ids.shape[1]))
