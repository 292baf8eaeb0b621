"""The streaming fold: read a tensor, drop or rename or multiply it, write it. No model is
instantiated.

Removed layers are dropped and later ones renumbered; corrections (W' of GradMAP's Eq. 13, and
others) are folded into their weights in float64 and rounded once to the dtype that is stored, or
to eight bits. Memory: one tensor and the corrections, and for a W' also W in float64, before and
after.

Speed: the disk's, where one core keeps up with it. One of an EPYC with AVX-512 makes, in bytes of a
bfloat16 weight of 4096 x 11008, 1.0 GB/s of weights with low-rank corrections (r = 16), and 1.6 of
weights that only change their dtype; a W' takes 6 s, for its product has 370 GFLOP in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from export.quantisation import quantise_weight, quantised_specs
from export.safetensors_writer import write_safetensors
from gradmap.common.console import progress
from gradmap.common.errors import UserError
from gradmap.common.files import write_json
from gradmap.common.finite import is_finite
from gradmap.model.architectures import Architecture
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.configs import layer_count
from gradmap.model.corrections import HIDDEN_STATE, Change, Changes, Place, Projection, fold_changes
from gradmap.model.model_files import INDEX_NAME
from gradmap.model.safetensors_reader import StoredTensor, TensorSpec, list_tensors, read_tensors
from gradmap.model.sublayers import Pair, Part, places_of_left, sublayers_of


@dataclass(frozen=True)
class FoldedTensor:
    """One tensor to write: where it comes from, and what changes it.

    spec: what it becomes. rounded: what its numbers are rounded to before, if that is not what they
    are stored as. quantise: what of export.quantisation.EIGHT_BITS that is then stored as, if it
    is.
    """

    source: StoredTensor
    spec: TensorSpec
    changes: tuple[Change, ...] = ()
    transposed: bool = False
    rounded: torch.dtype | None = None
    quantise: str | None = None

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """What is written: the tensor, or the quantised tensor and its scales."""
        if self.quantise is None:
            return (self.spec,)
        return quantised_specs(self.spec, self.quantise)

    @property
    def stored_bytes(self) -> int:
        return sum(spec.bytes for spec in self.stored)


def plan_fold(
    checkpoint: Checkpoint,
    architecture: Architecture,
    removed: Sequence[Pair],
    changes: Changes,
    dtype: torch.dtype | None,
    quantise: str | None = None,
    widen_vectors: bool = False,
) -> list[FoldedTensor]:
    """Decides, from the checkpoint's headers alone, what becomes of every tensor.

    dtype: of the floating-point tensors; None keeps each tensor's own. quantise: what
    of export.quantisation.EIGHT_BITS the layers' linear maps are stored as, if so. widen_vectors:
    store gains and biases, rounded all the same, in float32, for a program that goes on computing
    with them. Raises UserError if a layer or a weight to correct is not in the checkpoint.
    """
    require_foldable(checkpoint, architecture, changes)
    places = places_of_left(layer_count(checkpoint.config), removed)
    folded: list[FoldedTensor] = []
    missing = set(changes)
    for source in chain.from_iterable(map(list_tensors, checkpoint.weight_files)):
        name = architecture.name_left(source.spec.name, places)
        if name is None:
            continue
        changed = architecture.places_of(source.spec.name, changes)
        is_map = architecture.is_map_of_a_layer(source.spec)
        spec = _stored_as(source, name, dtype)
        is_wide = widen_vectors and len(spec.shape) == 1 and spec.dtype.is_floating_point
        # a bias by itself is no map
        missing -= set() if source.spec.name.endswith(".bias") else set(changed)
        folded.append(
            FoldedTensor(
                source,
                replace(spec, dtype=torch.float32) if is_wide else spec,
                changes=tuple(chain.from_iterable(changes[place] for place in changed)),
                transposed=architecture.transposed_linear,
                rounded=spec.dtype if is_wide else None,
                quantise=quantise if is_map else None,
            )
        )
    _require_complete(checkpoint, architecture, len(places) // len(Part), missing, folded)
    return folded


def _stored_as(source: StoredTensor, name: str, dtype: torch.dtype | None) -> TensorSpec:
    """The tensor under another name; in `dtype`, unless that is None or it holds no floating-point
    numbers."""
    spec = source.spec
    if dtype is None or not spec.dtype.is_floating_point:
        dtype = spec.dtype
    return TensorSpec(name, dtype, spec.shape)


def require_foldable(checkpoint: Checkpoint, architecture: Architecture, changes: Changes) -> None:
    """Raises UserError if a change is not one of weights."""
    kinds = set(map(type, chain.from_iterable(changes.values())))
    if HIDDEN_STATE in {place.target for place in changes}:
        raise UserError(
            "The plan patches the hidden state between layers (--compensator linear-patch or "
            "ghosted), which no stock checkpoint can hold. gradmap eval --plan measures it; prune "
            "with another compensator to export."
        )
    if not architecture.is_fitted and Projection in kinds:
        raise UserError(
            f"{checkpoint.name} cannot be corrected by W': {architecture.uncorrectable}; prune "
            "again."
        )


def split_shards(folded: Sequence[FoldedTensor], shard_bytes: int) -> list[list[FoldedTensor]]:
    """Cuts the tensors, in order, into shards of at most `shard_bytes` (a larger tensor gets its
    own)."""
    shards: list[list[FoldedTensor]] = [[]]
    size = 0
    for tensor in folded:
        if shards[-1] and size + tensor.stored_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.stored_bytes
    return shards


def write_folded(
    directory: Path, folded: Sequence[FoldedTensor], shard_bytes: int
) -> dict[str, str]:
    """Writes the shards (and their index, if several). Returns file name -> SHA-256 of the
    shards."""
    shards = split_shards(folded, shard_bytes)
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    with progress("Writing tensors", len(folded)) as advance:
        for number, shard in enumerate(shards, start=1):
            name = _shard_name(number, len(shards))
            tensors = _folded_values(shard, advance)
            specs = list(chain.from_iterable(tensor.stored for tensor in shard))
            hashes[name] = write_safetensors(directory / name, specs, tensors)
            weight_map |= {spec.name: name for spec in specs}
    if len(shards) > 1:
        total = sum(tensor.stored_bytes for tensor in folded)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX_NAME, index)
    return hashes


def _shard_name(number: int, shards: int) -> str:
    """As transformers names them."""
    if shards == 1:
        return "model.safetensors"
    return f"model-{number:05}-of-{shards:05}.safetensors"


def count_parameters(folded: Sequence[FoldedTensor]) -> int:
    """How many floating-point numbers there are before some are quantised."""
    specs = [tensor.spec for tensor in folded]
    return sum(prod(spec.shape) for spec in specs if spec.dtype.is_floating_point)


def _folded_values(
    shard: Sequence[FoldedTensor], advance: Callable[[int], None]
) -> Iterator[Tensor]:
    values = read_tensors([tensor.source for tensor in shard])
    for tensor, value in zip(shard, values, strict=True):
        if tensor.quantise is not None:
            yield from quantise_weight(_folded(value, tensor, torch.float32), tensor.quantise)
        else:
            rounded = _folded(value, tensor, tensor.rounded or tensor.spec.dtype)
            yield rounded.to(tensor.spec.dtype)
        advance(1)


def _folded(value: Tensor, tensor: FoldedTensor, dtype: torch.dtype) -> Tensor:
    """The value, of any shape, with the tensor's changes, in `dtype`. Raises UserError where that
    is no number: float16 ends at 65504."""
    if tensor.changes:
        folded = fold_changes(value, tensor.changes, tensor.transposed, dtype)
    else:
        folded = value.to(dtype)
    if (folded is not value or tensor.quantise) and not is_finite(folded):
        name = f"{tensor.source.spec.name} in {tensor.source.file}"
        if not is_finite(fold_changes(value, tensor.changes, tensor.transposed)):
            raise UserError(f"{name} holds NaN or infinity; fetch it again.")
        raise UserError(f"{name} does not fit in {dtype}; export with --dtype bfloat16 or float32.")
    return folded


def _require_complete(
    checkpoint: Checkpoint,
    architecture: Architecture,
    kept: int,
    missing: set[Place],
    folded: Sequence[FoldedTensor],
) -> None:
    parsed = [architecture.parse_tensor_name(tensor.spec.name) for tensor in folded]
    present = {architecture.sublayer_of(name[1], name[2]) for name in parsed if name is not None}
    if present != set(sublayers_of(range(kept))):
        raise UserError(
            f"{checkpoint.name} lacks the weights of some layers that its config names; fetch it "
            "again."
        )
    if missing:
        layer, target = min(missing)
        raise UserError(
            f"{checkpoint.name} lacks the weight of {target} in layer {layer}, which the plan "
            "corrects."
        )
