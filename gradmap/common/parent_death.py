"""No process outlives the one that started it, however that ended (on Linux; elsewhere nothing
tells).

`python parent_death.py PARENT COMMAND ...` becomes the command, which keeps the promise. That needs
nothing installed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def end_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when the thread that started it ends, and so at the
    latest when its process does. Ends it at once if `parent`, the number of that process, has ended
    before. A fork has to ask anew."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def bound_to_us(command: Sequence[str]) -> list[str]:
    """The command line of a program that ends with the thread of ours that starts it: one that
    waits for it."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
