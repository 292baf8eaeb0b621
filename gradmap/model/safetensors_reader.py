"""Reads safetensors files one tensor at a time.

The safetensors library maps what it reads, so that a process comes to hold the file. The format
needs no library: eight bytes of header length, a JSON header with every tensor's dtype, shape and
offsets, then the raw little-endian data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from annotated_types import Len
from pydantic import ConfigDict, NonNegativeInt, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from gradmap.common.errors import UserError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class _Entry(TypedDict):
    """What a file's header says of one tensor, and where it is."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Len(2, 2)]


_ENTRIES = TypeAdapter(dict[str, _Entry], config=ConfigDict(strict=True))


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
    """What a file holds, from its header alone. Raises UserError for a dtype that cannot be
    written."""
    data_start, entries = read_safetensors_header(path)
    stored = []
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{name} in {path} has dtype {entry['dtype']}, which is not supported.")
        spec = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        stored.append(StoredTensor(path, data_start + entry["data_offsets"][0], spec))
    return stored


def read_tensors(stored: Sequence[StoredTensor]) -> Iterator[Tensor]:
    """Yields the tensors in turn, all in one buffer: each is valid until the next is taken.

    Memory: the largest tensor. The kernel is told of the next one, so that it reads ahead while
    this one is used.
    """
    buffer = torch.empty(
        max((tensor.spec.bytes for tensor in stored), default=0), dtype=torch.uint8
    )
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(path.open("rb"))
            for path in {tensor.file for tensor in stored}
        }
        for tensor, following in zip_longest(stored, stored[1:]):
            if following is not None:
                descriptor = files[following.file].fileno()
                os.posix_fadvise(
                    descriptor, following.offset, following.spec.bytes, os.POSIX_FADV_WILLNEED
                )
            yield _read_into(buffer[: tensor.spec.bytes], files[tensor.file], tensor)


def read_tensor(stored: StoredTensor, pinned: bool = False) -> Tensor:
    """Reads one tensor into memory of its own. pinned: in which a GPU copies it by itself."""
    with stored.file.open("rb") as file:
        return _read_into(
            torch.empty(stored.spec.bytes, dtype=torch.uint8, pin_memory=pinned), file, stored
        )


def _read_into(buffer: Tensor, file: BinaryIO, stored: StoredTensor) -> Tensor:
    file.seek(stored.offset)
    count = file.readinto(buffer.numpy().data)  # type: ignore[attr-defined]
    if count != stored.spec.bytes:  # the file's length was checked when it was opened
        raise UserError(f"{stored.file} was cut short while it was read; copy it again.")
    return buffer.view(stored.spec.dtype).reshape(stored.spec.shape)


def check_safetensors(path: Path) -> None:
    """Raises UserError if a safetensors file is not exactly as long as its header says."""
    data_start, entries = read_safetensors_header(path)
    size = path.stat().st_size
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != data_start + end:
        raise UserError(
            f"{path} has {size} bytes where its header says {data_start + end}; copy it again."
        )


def read_safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Returns where the data starts (bytes) and, by tensor name, its dtype, shape and offsets from
    there."""
    try:
        with path.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(header_size, path.stat().st_size)))
        header.pop("__metadata__", None)
        _ENTRIES.validate_python(header)
        return 8 + header_size, header
    except (struct.error, ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(
            f"{path} is not a safetensors file, or is cut short; copy it again."
        ) from None
