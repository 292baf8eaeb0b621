"""Files that are either whole or absent: hashes, atomic JSON, atomic directories, and where caches go."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from gradmap.console import waiting
from gradmap.errors import UserError

CHUNK_BYTES = 1 << 22
# In every artifact: what it is, its files' hashes, and how it was verified.
ARTIFACT_FILE = "gradmap.json"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


def cache_directory() -> Path:
    """`$GRADMAP_CACHE`, or ~/.cache/gradmap."""
    return Path(os.environ.get("GRADMAP_CACHE") or Path.home() / ".cache" / "gradmap")


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically: readers see the old file or the whole new one. Raises ValueError on NaN and infinity."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically (temporary sibling, fsync, rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_partials(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def refuse_foreign_directory(path: Path, marker: str) -> None:
    """Raises UserError if `path` holds something that is not an earlier result (recognised by its `marker` file)."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a directory for the output.")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).exists():
        raise UserError(
            f"{path} is not empty and holds no {marker}, so it will not be overwritten; name another directory."
        )


@contextmanager
def atomic_directory(path: Path, marker: str) -> Iterator[Path]:
    """Yields a temporary sibling directory that becomes `path` when the block ends without an error.

    An earlier result at `path` (it holds a file named `marker`) is replaced only then; on any error the
    temporary directory is removed and the earlier result stays.
    """
    refuse_foreign_directory(path, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_debris(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        with waiting(f"Writing {path} to the disk"):
            _sync_tree(partial)
            _replace_directory(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_debris(path: Path) -> None:
    """Removes what killed runs left beside `path`."""
    _remove_partials(path)
    retired = path.with_name(f".{path.name}.retired")
    if retired.exists():
        if path.exists():
            shutil.rmtree(retired)
        else:  # killed between the two renames of _replace_directory: the earlier result comes back
            retired.rename(path)


def _remove_partials(path: Path) -> None:
    for debris in path.parent.glob(f".{path.name}.partial-*"):
        writer = int(debris.name.rpartition("-")[2])
        # In a new container, this process may have the number of the one that was killed in the last.
        if writer != os.getpid() and psutil.pid_exists(writer):
            continue
        if debris.is_dir():
            shutil.rmtree(debris, ignore_errors=True)
        else:
            debris.unlink(missing_ok=True)


def _sync_tree(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_directory(new: Path, path: Path) -> None:
    """Readers see the earlier result or the new one. Where the file system cannot exchange names, a reader between
    two renames sees neither; the earlier result is then kept beside until the new one is in place."""
    if not path.exists():
        new.rename(path)
    elif _exchange(new, path):
        shutil.rmtree(new)
    else:
        retired = path.with_name(f".{path.name}.retired")
        path.rename(retired)
        new.rename(path)
        shutil.rmtree(retired)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two directories in one step (Linux, renameat2); False where that is not to be had."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0)
