"""Programs that we start and wait for. None of them, and nothing that they started, outlives us:
not even if we are killed (see gradmap.common.parent_death)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from resource import struct_rusage
from typing import Any

import psutil

from gradmap.common.parent_death import bound_to_us

GRACE_S = 5
EXIT_WAIT_S = 5
# What `run_captured` waits for, in any thread.
_RUNNING: set[subprocess.Popen[str]] = set()


def module_command(module: str, *arguments: str) -> list[str]:
    """Python with an installed module, which no file of the same name in the working directory
    replaces (-P)."""
    return [sys.executable, "-P", "-m", module, *arguments]


def run_process(command: Sequence[str], **options: Any) -> tuple[int, struct_rusage]:
    """Exit code and use of resources of one process, in a session of its own; -N if signal N killed
    it.

    Where we are interrupted, it gets SIGTERM and the time that it needs to tidy up. What is left of
    its session when it has ended, as children of a process that was killed, is killed. options: of
    subprocess.Popen.
    """
    process = subprocess.Popen(bound_to_us(command), start_new_session=True, **options)
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        kill_group(process.pid)
    return process.returncode, usage


def peak_bytes(usage: struct_rusage) -> int:
    """Peak resident memory of a process, in bytes."""
    return usage.ru_maxrss * 1024


def run_captured(
    command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs one process to its end with what it says kept, in any thread. `ending_children` ends it
    before."""
    pipe = subprocess.PIPE
    nothing = subprocess.DEVNULL
    bound = bound_to_us(command)
    with subprocess.Popen(
        bound, env=environment, text=True, stdin=nothing, stdout=pipe, stderr=pipe
    ) as process:
        _RUNNING.add(process)
        try:
            stdout, stderr = process.communicate()
        except BaseException:
            _end_family(process)
            raise
        finally:
            _RUNNING.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextmanager
def ending_children() -> Iterator[None]:
    """Ends what `run_captured` waits for in other threads, if the block fails: their pool would
    wait for it."""
    try:
        yield
    except BaseException:
        for process in list(_RUNNING):
            _end_family(process)
        raise


def kill_group(process_group: int) -> None:
    """Kills what is left of a process group and waits until it has ended; a group that is gone
    already is fine."""
    members = [
        process for process in psutil.process_iter() if _group_of(process.pid) == process_group
    ]
    with suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)
    psutil.wait_procs(members, timeout=EXIT_WAIT_S)


def _end_family(process: subprocess.Popen[str]) -> None:
    """SIGTERM and a moment for a process, then SIGKILL for it and for all that it has started."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    process.kill()
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=EXIT_WAIT_S)


def _group_of(process_id: int) -> int | None:
    try:
        return os.getpgid(process_id)
    except ProcessLookupError:
        return None
