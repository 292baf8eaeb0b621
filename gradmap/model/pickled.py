"""Legacy `.bin` weights as safetensors: converted once, into the cache directory, where the user
allows it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from gradmap.common.console import announced, waiting
from gradmap.common.errors import UserError, first_line
from gradmap.common.failures import explain
from gradmap.common.files import cache_directory, sha256_file, sha256_json, write_json
from gradmap.common.made_once import made_once
from gradmap.model.model_files import COMPANION_PATTERNS, INDEX_NAME, copy_files, own_files

PICKLED_WEIGHTS = "pytorch_model*.bin"


def convert_pickled(directory: Path) -> Path:
    """Returns a cached checkpoint with the weights of `.bin` files as safetensors, file for file.

    torch.load(weights_only=True) builds tensors and plain containers only; it calls no code of the
    file.
    """
    sources = own_files(directory, [PICKLED_WEIGHTS])
    if not sources:
        return directory  # nothing to convert: the missing weight file is reported as such
    with waiting(f"Hashing the weights of {directory}"):
        read = [*sources, *own_files(directory, COMPANION_PATTERNS)]
        hashes = {str(path.relative_to(directory)): sha256_file(path) for path in read}
    target = cache_directory() / "unpickled" / sha256_json(hashes)[:16]
    what = (
        f"Converting {len(sources)} pickled weight file(s) of {directory} to safetensors in "
        f"{target} (once)"
    )

    def make(made: Path) -> None:
        with announced(what):
            _write_unpickled(sources, made)
            copy_files(directory, made, COMPANION_PATTERNS)

    return made_once(target, make)


def _write_unpickled(sources: Sequence[Path], directory: Path) -> None:
    weight_map: dict[str, str] = {}
    for number, source in enumerate(sources, start=1):
        name = f"model-{number:05}-of-{len(sources):05}.safetensors"
        tensors = _read_pickled(source)
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    write_json(directory / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        # only the format that torch writes since 1.6, a zip archive, can be mapped
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        damaged = UserError(
            f"{path} is not a file of plain tensors, or is damaged: {first_line(error)}"
        )
        raise explain(error) or damaged from None
    if not isinstance(state, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in state.values()
    ):
        raise UserError(
            f"{path} holds other things than tensors by name; save the model's state_dict() alone."
        )
    # a copy each: tied weights share memory, which safetensors does not store
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}
