"""Who is writing a result: one process at a time, on any host that sees the same files.

A lock is one on a file (flock), which the kernel frees when its holder ends, however that happens:
what a killed run left blocks nobody. It holds in every container of a machine, and over NFS. The
file says who holds it, for people.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from gradmap.common.console import announced, say
from gradmap.common.errors import UserError

LOCK_SUFFIX = ".lock"
# Of a directory that results are put into, where one that is replaced has its lock beside it.
INNER_LOCK = ".gradmap.lock"
# What file systems without locks answer (some over the network, some in user space).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_HELD: dict[Path, bool] = {}


@contextmanager
def writing(path: Path, wait: bool = False) -> Iterator[bool]:
    """While the block runs, nobody else writes the file or directory `path`, which is replaced
    whole.

    Yields whether that is so: not every file system has locks. Within such a block of the same
    process, another one for the same path changes nothing. wait: for who writes now, if somebody
    does. Raises UserError that names them if not.
    """
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    with _holding(place.with_name(f".{place.name}{LOCK_SUFFIX}"), path, wait) as held:
        yield held


@contextmanager
def writing_into(directory: Path) -> Iterator[None]:
    """While the block runs, nobody else writes into `directory`, where results are put one by one;
    it is made for that, and goes if none came."""
    place = Path(os.path.realpath(directory))
    is_new = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    try:
        with _holding(place / INNER_LOCK, directory, wait=False):
            yield
    finally:
        if is_new:
            # Something may be in it.
            with suppress(OSError):
                place.rmdir()


@contextmanager
def _holding(lock: Path, what: Path, wait: bool) -> Iterator[bool]:
    if lock in _HELD:
        yield _HELD[lock]
        return
    descriptor = _take(lock, what, wait)
    _HELD[lock] = descriptor is not None
    try:
        if descriptor is not None:
            _sign(descriptor)
        yield descriptor is not None
    finally:
        del _HELD[lock]
        # It is free once it is closed, whether its file goes or not.
        with suppress(OSError):
            lock.unlink()
        if descriptor is not None:
            os.close(descriptor)


def _take(lock: Path, what: Path, wait: bool) -> int | None:
    """The open file that holds the lock; None where there are no locks."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, what, wait)
            if _is_at(lock, descriptor):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            say(
                f"Warning: the file system of {what} has no locks, so that another run into it "
                "would not be noticed"
            )
            return None
        except BaseException:
            os.close(descriptor)
            raise
        # Its last holder removed the file meanwhile, and the next one takes another.
        os.close(descriptor)


def _lock(descriptor: int, what: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor)
        if not wait:
            raise UserError(
                f"{what} is being written by {holder}; wait until that has ended, or name another "
                "place."
            ) from None
        with announced(f"Waiting for {holder}, which writes {what}"):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_at(lock: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    return False


def _sign(descriptor: int) -> None:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    signature = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(signature).encode(), 0)


def _holder(descriptor: int) -> str:
    """Whoever took it last, in words; a process's number is that of its own container."""
    try:
        signed = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {signed['process']} on {signed['host']} since {signed['since']}"
    # It is about to sign.
    except (ValueError, KeyError, TypeError):
        return "another process"
