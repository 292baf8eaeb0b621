"""The tensors of a plan's corrections, as files.

Those of almost all kinds are small, and stand in one file. What was trained at full rank is as
large as the model's weights: it stands beside them in files of its own, whose hashes the plan has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradmap.common.errors import UserError, first_line
from gradmap.common.files import sha256_file
from gradmap.common.finite import require_finite
from gradmap.model.corrections import (
    CHANGES,
    Change,
    Changes,
    Place,
    Trained,
    gather_changes,
)
from gradmap.pruning.correction_records import CorrectionRecord, stored

CORRECTIONS_FILE = "corrections.safetensors"
TRAINED_FILES = "trained{suffix}.safetensors"
LARGEST_FILE_BYTES = 5 * 10**9


def write_changes(
    directory: Path, records: Sequence[CorrectionRecord], changes: Changes
) -> dict[str, str]:
    """Writes the tensors of the accepted ones of these records, whose changes are among `changes`.
    Returns the files of what was trained at full rank, name -> SHA-256.

    Raises UserError if a tensor is not finite.
    """
    trained: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    in_order = {place: iter(of_place) for place, of_place in changes.items()}
    for correction in stored(records):
        change = next(in_order[correction.record.place])
        kind = trained if isinstance(change, Trained) else others
        kind |= correction.named(change.tensors)
    for name, tensor in (trained | others).items():
        require_finite(f"The correction {name}", tensor)
    save_file(
        {name: tensor.float().cpu().contiguous() for name, tensor in others.items()},
        directory / CORRECTIONS_FILE,
    )
    return _write_trained(directory, trained) if trained else {}


def _write_trained(directory: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    save_torch_state_dict(
        tensors, directory, filename_pattern=TRAINED_FILES, max_shard_size=LARGEST_FILE_BYTES
    )
    files = sorted(directory.glob(TRAINED_FILES.format(suffix="*")))
    return {file.name: sha256_file(file) for file in files}


def read_changes(
    directory: Path, records: Sequence[CorrectionRecord], trained_files: Mapping[str, str]
) -> Changes:
    """Every accepted correction, by the weight it changes. trained_files: as `write_changes`
    returns them. Raises UserError if a file is missing, damaged, or not what the plan names."""
    tensors = load_tensors(directory / CORRECTIONS_FILE)
    for name, sha256 in trained_files.items():
        tensors |= _read_trained(directory / name, sha256)
    pairs: list[tuple[Place, Change]] = []
    for correction in stored(records):
        record = correction.record
        try:
            change = CHANGES[record.kind](**correction.own(tensors))
        except (KeyError, TypeError):
            raise UserError(
                f"{directory / CORRECTIONS_FILE} lacks {correction.name}, which plan.json names; "
                "prune again."
            ) from None
        pairs.append((record.place, change))
    return gather_changes(pairs)


def _read_trained(path: Path, sha256: str) -> dict[str, Tensor]:
    tensors = load_tensors(path)
    if sha256_file(path) != sha256:
        raise UserError(f"{path} is not what plan.json was made with; heal again.")
    return tensors


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Raises UserError if the file is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; prune again.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged, or cannot be read ({first_line(error)}); prune again."
        ) from None
