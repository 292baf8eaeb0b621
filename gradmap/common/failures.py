"""What an exception that nobody caught says about the machine: its disk is full, or its memory is.

Libraries have types of their own for both; they are known by what they say, so that none has to be
imported.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from gradmap.common.errors import OutOfMemoryError, UserError, first_line

MEMORY_CURE = (
    "free some, use a machine or a container with more, or ask for less (--stream, fewer "
    "--samples or --tokens, --dtype bfloat16)"
)
# What a disk or a path is at fault for. Others, as a file that is not there, are more likely a
# mistake of ours.
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_ANY_ACCESS = (
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
)
# safetensors says: I/O error: No space left on device (os error 28)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# torch.save says that its zip file could not be written, but not why
_TORCH_WRITER = re.compile(
    r"PytorchStreamWriter failed|inline_container\.cc.*(write|unexpected pos)", re.DOTALL
)
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
# How torch and Python say it, where only their words are known.
_MEMORY_WORDS = re.compile(r"\b(OutOfMemoryError|MemoryError)\b|can't allocate memory")
_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def explain(error: BaseException) -> UserError | None:
    """The sentence for a full disk, a file that cannot be written, or want of memory; None for
    another failure."""
    for cause in _causes(error):
        if is_out_of_memory(cause):
            return OutOfMemoryError(f"Memory ran out ({type(cause).__name__}); {MEMORY_CURE}.")
        if (problem := _disk_problem(cause)) is not None:
            return UserError(f"{getattr(cause, 'filename', None) or 'the output'} {problem}.")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: torch's CPU allocator raises a plain
    RuntimeError, and the system an OSError."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    of_torch = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return of_torch or says_out_of_memory(str(error))


def says_out_of_memory(text: str) -> bool:
    """Whether what another program, or a library, said last means that memory ran out."""
    return _MEMORY_WORDS.search(text) is not None


def was_killed(code: int) -> bool:
    """Whether an exit code says that a process got SIGKILL, as the system sends where memory runs
    out."""
    return code in _KILLED


def require_not_killed(code: int, what: str, cure: str = MEMORY_CURE) -> None:
    """Raises OutOfMemoryError if a process that ended with this code was killed. what: as the
    sentence begins."""
    if was_killed(code):
        raise OutOfMemoryError(
            f"{what} was killed, as the system does where memory runs out; {cure}."
        )


def count_oom_kills(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """How many processes of this one's control group (a container, on a desktop a terminal) the
    system has killed for want of memory so far; 0 where nothing tells."""
    try:
        (path,) = (
            line.removeprefix("0::")
            for line in membership.read_text().splitlines()
            if line.startswith("0::")
        )
        events = dict(
            line.split()
            for line in (cgroups / path.lstrip("/") / "memory.events").read_text().splitlines()
        )
        return int(events["oom_kill"])
    except (OSError, ValueError, KeyError):
        return 0


def explain_kills(error: Exception, kills_before: int) -> OutOfMemoryError | None:
    """The sentence for a failure while processes were killed for want of memory: one of them was
    perhaps the engine of a server, whose end the others only notice. None if none was, since
    `kills_before`."""
    if count_oom_kills() <= kills_before:
        return None
    return OutOfMemoryError(
        f"{first_line(error)} Meanwhile the system has killed a process because memory ran out; "
        f"{MEMORY_CURE}."
    )


def _disk_problem(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return _describe(error.errno)
    if found := _OS_ERROR.search(str(error)):
        return _describe(int(found[1]))
    return "cannot be written: the disk may be full" if _TORCH_WRITER.search(str(error)) else None


def _describe(number: int | None) -> str | None:
    if number in _WRITING:
        return f"cannot be written: {os.strerror(number)}"
    return f"cannot be accessed: {os.strerror(number)}" if number in _ANY_ACCESS else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it was raised for, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
