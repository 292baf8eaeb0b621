"""Processes that a library has started for us, and that would not notice our end, are killed when
it comes.

`python orphans.py PID ...` kills them once nothing more can come from its standard input. That
needs nothing installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from multiprocessing import active_children


class Watch:
    """Kills what multiprocessing has started in our process when that ends, however it does, or
    closes the watch.

    And what was started by that in turn: vLLM's workers do not notice that its engine was killed.
    """

    def __init__(self) -> None:
        # Not above: the program needs nothing installed.
        import psutil

        started = [psutil.Process(process.pid) for process in active_children()]
        descendants = (process.children(recursive=True) for process in started)
        family = [*started, *chain.from_iterable(descendants)]
        ids = [str(process.pid) for process in family]
        command = [sys.executable, "-I", "-S", __file__, *ids]
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
