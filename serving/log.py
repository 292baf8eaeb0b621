"""What `gradmap-serve` says, and where vLLM's output goes."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from gradmap.console import say

ROTATE_BYTES = 50_000_000
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
# After the names of process and file: an exception, what argparse says, or that the engine is gone.
ERROR = re.compile(
    r"^(?:\(\w+ pid=\d+\) )?(?:(?:ERROR|WARNING) [^\]]*\] )?"
    r"(?:[\w.]*?(\w*(?:Error|Exception): .+)|\S+ serve: error: (.+)|.*(engine core exited unexpectedly))"
)
# Follows from another error, which stands above it.
CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "WorkerProc initialization failed")


class Log:
    """Lines of vLLM go to a file (kept below 100 MB), or to stderr if `path` is None; messages of ours go to stderr.

    as_json: each line becomes an object with time, level, source and message.
    """

    def __init__(self, path: Path | None = None, as_json: bool = False) -> None:
        self.path, self.as_json = path, as_json
        self._file: logging.Handler | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            # A full disk makes it complain on stderr and go on.
            self._file = RotatingFileHandler(path, maxBytes=ROTATE_BYTES, backupCount=1)

    def say(self, message: str, level: str = "INFO") -> None:
        if self.as_json:
            print(self._as_object(message, level, "gradmap-serve"), file=sys.stderr, flush=True)
        else:
            say(message if level == "INFO" else f"{level.capitalize()}: {message}")

    def relay(self, line: str) -> None:
        """A line of vLLM."""
        level = LEVEL.search(line)
        text = self._as_object(line, level[0] if level else "INFO", "vllm") if self.as_json else line
        if self._file is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._file.handle(logging.makeLogRecord({"msg": text}))

    @property
    def location(self) -> str:
        return "its output is above" if self.path is None else f"log: {self.path}"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @staticmethod
    def _as_object(message: str, level: str, source: str) -> str:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": now, "level": level, "source": source, "message": message})


class Output:
    """What one vLLM process prints, line by line: passed on, and watched for phases and errors."""

    def __init__(self, log: Log, on_phase: Callable[[str], None] = lambda phase: None) -> None:
        self._log, self._on_phase = log, on_phase
        self.phase = FIRST_PHASE
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def follow(self, lines: Iterable[bytes]) -> None:
        """Returns when the process, and all that inherited its output, have ended."""
        for raw in lines:
            line = raw.decode(errors="replace").rstrip("\r\n")  # vLLM ends the lines of a traceback with both
            self._tail.append(line)
            self._log.relay(line)
            for sign, phase in PHASES.items():
                if sign in line:
                    self.phase = phase
                    self._on_phase(phase)

    def error(self) -> str | None:
        """The first error among the last lines that is no consequence of another."""
        matches = (ERROR.match(line) for line in list(self._tail))
        found = [next(filter(None, match.groups())) for match in matches if match]
        causes = [text for text in found if not any(sign in text for sign in CONSEQUENCES)]
        return next(iter(causes or found), None)
