"""Reads and writes safetensors files one tensor at a time, hashing what is written as it goes.

The safetensors library writes from tensors that are all in memory, and maps what it reads, so that a process comes to
hold the file. The format itself needs neither: eight bytes of header length, a JSON header with every tensor's dtype,
shape and offsets, then the raw little-endian data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from export.direct_file import DirectFile
from gradmap.checkpoint import read_safetensors_header
from gradmap.errors import UserError

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


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: `offset` bytes into `file`."""

    file: Path
    offset: int
    spec: TensorSpec


def list_tensors(path: Path) -> list[StoredTensor]:
    """What a file holds, from its header alone. Raises UserError for a dtype that cannot be written."""
    data_start, entries = read_safetensors_header(path)
    stored = []
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{name} in {path} has dtype {entry['dtype']}, which cannot be exported.")
        spec = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        stored.append(StoredTensor(path, data_start + entry["data_offsets"][0], spec))
    return stored


def read_tensors(stored: Sequence[StoredTensor]) -> Iterator[Tensor]:
    """Yields the tensors in turn, all in one buffer: each is valid until the next is taken.

    Memory: the largest tensor. The kernel is told of the next one, so that it reads ahead while this one is used.
    """
    buffer = torch.empty(max((tensor.spec.bytes for tensor in stored), default=0), dtype=torch.uint8)
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {tensor.file for tensor in stored}}
        for tensor, following in zip_longest(stored, stored[1:]):
            if following is not None:
                descriptor = files[following.file].fileno()
                os.posix_fadvise(descriptor, following.offset, following.spec.bytes, os.POSIX_FADV_WILLNEED)
            raw = buffer[: tensor.spec.bytes]
            files[tensor.file].seek(tensor.offset)
            count = files[tensor.file].readinto(raw.numpy().data)
            assert count == tensor.spec.bytes, tensor  # the file's length was checked when it was opened
            yield raw.view(tensor.spec.dtype).reshape(tensor.spec.shape)


def write_safetensors(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor]) -> str:
    """Writes `tensors`, which must come in the order of `specs` and be as they say. Returns the file's SHA-256.

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
