"""Processes that a library has started for us, and that would not notice our end, are killed when it comes.

`python orphans.py PID ...` kills them once nothing more can come from its standard input. That needs nothing installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress


class Watch:
    """Kills these processes, by their numbers, when our process ends, however that is, or closes the watch."""

    def __init__(self, processes: Iterable[int]) -> None:
        command = [sys.executable, "-I", "-S", __file__, *map(str, processes)]
        # in a session of its own, for ctrl-C in a terminal would end it before us
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        self._watcher.communicate()


def main(processes: Iterable[str]) -> None:
    sys.stdin.read()
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
