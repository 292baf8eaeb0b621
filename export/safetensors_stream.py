"""Writes a safetensors file one tensor at a time, hashing as it goes.

The safetensors library needs all tensors of a file in memory; the format itself does not: eight bytes of header
length, a JSON header with every tensor's dtype, shape and offsets, then the raw little-endian data in that order.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What the header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor]) -> str:
    """Writes `tensors`, which must come in the order of `specs` and be as they say. Returns the file's SHA-256.

    Memory: one tensor.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as pool:

        def write(data: bytes | memoryview) -> None:
            hashing = pool.submit(digest.update, data)  # beside the writing: both leave Python's lock
            file.write(data)
            hashing.result()

        write(_encode_header(specs))
        for spec, tensor in zip(specs, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec
            write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
