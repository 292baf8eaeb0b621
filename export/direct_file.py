"""Writes a large file at the disk's speed: past the page cache, hashed on another core.

Copying 10 GB into the page cache costs more processor time than the disk needs, and evicts what is
being read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

CHUNK_BYTES = 1 << 25
# Unbuffered writes want whole blocks of an aligned buffer; the last piece of a file is written the
# ordinary way.
BLOCK_BYTES = mmap.PAGESIZE


class DirectFile:
    """A new file for the length of a `with` block; afterwards `sha256` is that of its contents.

    Two chunks take turns: while one is hashed and written, the other is filled. Raises OSError if a
    write fails.
    """

    def __init__(self, path: Path) -> None:
        self.sha256 = ""
        self._digest = hashlib.sha256()
        self._descriptor = _open_unbuffered(path)
        self._filling, self._draining = mmap.mmap(-1, CHUNK_BYTES), mmap.mmap(-1, CHUNK_BYTES)
        self._used = 0
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._pending: list[Future[None]] = []

    def write(self, data: bytes | memoryview) -> None:
        done = 0
        while done < len(data):
            count = min(len(data) - done, CHUNK_BYTES - self._used)
            self._filling[self._used : self._used + count] = data[done : done + count]
            done, self._used = done + count, self._used + count
            if self._used == CHUNK_BYTES:
                self._drain(CHUNK_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown()
            os.close(self._descriptor)

    def _finish(self) -> None:
        tail = self._used % BLOCK_BYTES
        rest = bytes(self._filling[self._used - tail : self._used])
        self._drain(self._used - tail)
        self._wait()
        _make_buffered(self._descriptor)
        _write_all(self._descriptor, memoryview(rest))
        self._digest.update(rest)
        self.sha256 = self._digest.hexdigest()

    def _drain(self, count: int) -> None:
        """Hands the filled chunk to two threads, once they are done with the other one."""
        self._wait()
        self._filling, self._draining, self._used = self._draining, self._filling, 0
        chunk = memoryview(self._draining)[:count]
        work: list[Callable[[], None]] = [
            lambda: self._digest.update(chunk),
            lambda: _write_all(self._descriptor, chunk),
        ]
        self._pending = [self._pool.submit(step) for step in work]

    def _wait(self) -> None:
        for future in self._pending:
            future.result()
        self._pending = []


def _open_unbuffered(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:  # a file system without it (some network and memory ones)
        return os.open(path, flags, 0o644)


def _write_all(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.write(descriptor, data[done:])
        except OSError as error:
            # A full disk or a file size limit leaves room for less than a block: only a buffered
            # write says which.
            if error.errno != errno.EINVAL or not _make_buffered(descriptor):
                raise


def _make_buffered(descriptor: int) -> bool:
    """Returns whether the file was not so before."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)
