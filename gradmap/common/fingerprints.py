"""What files were when they were written, and whether they still are: by size and time, and by hash
where times differ.

A copy, as CI's caches restore one, has other times and the same contents.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from gradmap.common.files import sha256_file


class Stamp(BaseModel):
    """A version of a file."""

    size: int
    mtime_ns: int
    sha256: str


def fingerprint(paths: Sequence[Path], below: Path) -> dict[str, Stamp]:
    """The versions of `files_of(paths)`, by their paths below `below`."""
    found = {}
    for file in files_of(paths):
        status = file.stat()
        stamp = Stamp(size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=hash_file(file))
        found[os.path.relpath(file, below)] = stamp
    return found


def find_change(recorded: Mapping[str, Stamp], below: Path) -> str | None:
    """Says of the first recorded file that is gone, or has other contents; None if there is
    none."""
    for name, stamp in recorded.items():
        path = below / name
        if not path.is_file():
            return f"{path} is gone"
        if not _is_unchanged(path, stamp):
            return f"{path} was changed"
    return None


def is_remains(directory: Path, recorded: Mapping[str, Stamp], below: Path) -> bool:
    """Whether some of a directory's recorded files are gone, and it holds no others."""
    names = {name for name in recorded if directory in (below / name).parents}
    left = (
        {os.path.relpath(file, below) for file in files_of([directory])}
        if directory.is_dir()
        else names
    )
    return left < names


def hash_path(path: Path) -> Any:
    """A file's SHA-256; of a directory, those of its files by name; None if there is nothing (a hub
    id)."""
    if path.is_dir():
        return {
            str(file.relative_to(path)): hash_file(file)
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
    return hash_file(path) if path.is_file() else None


def hash_file(path: Path) -> str:
    """A file's SHA-256, once for each version of it: a model is the input of every stage."""
    status = path.stat()
    return _hash_version(path, status.st_size, status.st_mtime_ns)


@cache
def _hash_version(path: Path, size: int, modified_ns: int) -> str:
    return sha256_file(path)


def _is_unchanged(path: Path, stamp: Stamp) -> bool:
    status = path.stat()
    if status.st_size != stamp.size:
        return False
    return status.st_mtime_ns == stamp.mtime_ns or hash_file(path) == stamp.sha256


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    """These files, and all files in these directories but for hidden ones: locks, and what was
    never finished."""
    for path in paths:
        if path.is_dir():
            yield from _shown_files(path)
        else:
            yield path


def _shown_files(directory: Path) -> Iterator[Path]:
    for file in sorted(directory.rglob("*")):
        if file.is_file() and not any(
            part.startswith(".") for part in file.relative_to(directory).parts
        ):
            yield file
