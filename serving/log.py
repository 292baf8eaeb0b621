"""What `gradmap-serve` says, and where vLLM's output goes."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from gradmap.common.console import say
from serving.log_file import open_log
from serving.vllm_errors import find_error, plain

TAIL_LINES = 400
LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
# What a line says of how far a start has come: the phase that begins with it.
PHASES = {
    "Resolved architecture": "starting the engine",
    "Starting to load model": "loading weights",
    "Loading weights took": "warming up",
    "Warming up model for the compilation": "compiling",  # on a CPU
    "Starting torch.compile": "compiling",
    "torch.compile took": "profiling memory",
    "Profiling CUDA graph memory": "capturing CUDA graphs",
    "init engine": "starting the API",
    "Application startup complete": "first completion",
}
FIRST_PHASE = "importing vLLM"


class Log:
    """Lines of vLLM go to a file (see serving.log_file), or to stderr if `path` is None; messages
    of ours go to stderr.

    as_json: each line becomes an object with time, level, source and message.
    """

    def __init__(self, path: Path | None = None, as_json: bool = False) -> None:
        self.path, self.as_json = path, as_json
        self._lines: logging.Handler | None = None

    def open(self) -> None:
        """Opens the file, unless it is open. Raises UserError if it cannot be written."""
        if self._lines is None:
            self._lines = open_log(self.path)

    def say(self, message: str, level: str = "INFO") -> None:
        # which rich raises: who listened is gone, no reason to stop serving
        with suppress(OSError, SystemExit):
            if self.as_json:
                print(self._as_object(message, level, "gradmap-serve"), file=sys.stderr, flush=True)
            else:
                say(message if level == "INFO" else f"{level.capitalize()}: {message}")

    def relay(self, line: str) -> None:
        """Writes a line of vLLM. Where it cannot be written, that is complained about on stderr."""
        self.open()
        assert self._lines is not None
        if self.as_json:
            level = LEVEL.search(plain(line))
            line = self._as_object(plain(line), level[0] if level else "INFO", "vllm")
        self._lines.handle(logging.makeLogRecord({"msg": line}))

    @property
    def location(self) -> str:
        return "its output is above" if self.path is None else f"log: {self.path}"

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    @staticmethod
    def _as_object(message: str, level: str, source: str) -> str:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": now, "level": level, "source": source, "message": message})


class Output:
    """The output of one vLLM process, line by line: passed on, and watched for phases and
    errors."""

    def __init__(self, log: Log, on_phase: Callable[[str], None] = lambda phase: None) -> None:
        self._log, self._on_phase = log, on_phase
        self.phase = FIRST_PHASE
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def follow(self, lines: Iterable[bytes]) -> None:
        """Returns when the process, and all that inherited its output, have ended."""
        for raw in lines:
            # vLLM ends the lines of a traceback with both
            line = raw.decode(errors="replace").rstrip("\r\n")
            self._tail.append(line)
            self._log.relay(line)
            for sign, phase in PHASES.items():
                if sign in line:
                    self.phase = phase
                    self._on_phase(phase)

    def error(self) -> str | None:
        """The first error among the last lines that is no consequence of another."""
        return find_error(list(self._tail))
