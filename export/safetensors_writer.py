"""Writes safetensors files one tensor at a time, hashing what is written as it goes.

The safetensors library writes from tensors that are all in memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from export.direct_file import DirectFile
from gradmap.model.safetensors_reader import DTYPE_NAMES, TensorSpec


def write_safetensors(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor]) -> str:
    """Writes `tensors`, which must come in the order of `specs` and be as they say. Returns the
    file's SHA-256.

    Memory: one tensor and two chunks.
    """
    with DirectFile(path) as file:
        file.write(_encode_header(specs))
        for spec, tensor in zip(specs, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return file.sha256


def _encode_header(specs: Sequence[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    return struct.pack("<Q", len(text)) + text
