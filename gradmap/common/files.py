"""Files that are either whole or absent: hashes, atomic JSON, atomic directories, and where caches
go."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradmap.common.console import waiting
from gradmap.common.locks import writing
from gradmap.common.outputs import refuse_foreign_directory

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
    """Writes JSON atomically: readers see the old file or the whole new one. Raises ValueError on
    NaN and infinity."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the name of a temporary sibling file, to be written, that becomes `path` when the
    block ends without an error. A link is written through."""
    with _partial_of(path) as (partial, place):
        try:
            yield partial
            _sync(partial)
            partial.replace(place)
            _sync(place.parent)
        finally:
            partial.unlink(missing_ok=True)


def remove_file(path: Path) -> None:
    """Removes a file that was written atomically, if it is there, and what killed runs left beside
    it."""
    with _partial_of(path):
        path.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Appends to a file, all of it or, if the disk is full, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A buffer would be written again when the file is closed.
    with path.open("ab", buffering=0) as file:
        before, rest = file.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


@contextmanager
def atomic_directory(path: Path, marker: str) -> Iterator[Path]:
    """Yields a temporary sibling directory that becomes `path` when the block ends without an
    error.

    An earlier result at `path` (it holds a file named `marker`) is replaced only then; on any error
    the temporary directory is removed and the earlier result stays. A link is written through.
    Files are as open to others as the umask says, whatever a library made of them.
    """
    refuse_foreign_directory(path, marker)
    with _partial_of(path) as (partial, place):
        partial.mkdir()
        try:
            yield partial
            _open_to_others(partial)
            with waiting(f"Writing {path} to the disk"):
                _sync_tree(partial)
                _replace_directory(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _partial_of(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yields a name that nothing has yet, beside where `path` leads, and that place."""
    with writing(path) as locked:
        place = Path(os.path.realpath(path))
        # Nobody else is at work there then.
        if locked:
            _remove_partials(place)
        _restore_retired(place)
        yield place.with_name(f".{place.name}.partial-{secrets.token_hex(4)}"), place


def _remove_partials(path: Path) -> None:
    """Removes what killed runs left beside `path`."""
    for debris in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        if debris.is_dir():
            shutil.rmtree(debris, ignore_errors=True)
        else:
            debris.unlink(missing_ok=True)


def _restore_retired(path: Path) -> None:
    """Brings the earlier result back where a run was killed between the two renames of
    _replace_directory."""
    retired = path.with_name(f".{path.name}.retired")
    if retired.exists() and path.exists():
        shutil.rmtree(retired)
    elif retired.exists():
        retired.rename(path)


def _open_to_others(directory: Path) -> None:
    """safetensors writes files that are the owner's alone."""
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


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
    """Puts a new result in an earlier one's place: readers see the one or the other. Where the file
    system cannot exchange names, a reader between two renames sees neither; the earlier result is
    then kept beside until the new one is in place."""
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
    return bool(
        renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0
    )
