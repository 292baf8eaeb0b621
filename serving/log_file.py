"""Where a log goes without harm to what is there: a regular file grows and is rotated, all else is
written through."""

from __future__ import annotations

import logging
import os
import stat
import sys
from contextlib import suppress
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from gradmap.common.errors import UserError

ROTATE_BYTES = 50_000_000
# Nobody but its owner reads a log.
MODE = 0o600
STREAMS = (1, 2)


def open_log(path: Path | None) -> logging.Handler:
    """The handler whose lines go behind what `path` holds, kept below 100 MB; to stderr without a
    path.

    A terminal, a pipe or a device is written to as it is, and so is a link to one, such as
    /dev/stdout. Raises UserError if it cannot be written.
    """
    if path is None:
        return logging.StreamHandler(sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_other(path)
        if descriptor is not None:
            return _WrittenThrough(_as_text(descriptor))
        return _PrivateFile(path.resolve(), maxBytes=ROTATE_BYTES, backupCount=1)
    except OSError as error:
        raise UserError(
            f"The log {path} cannot be written ({error.strerror}); choose another with --log."
        ) from None


def _open_other(path: Path) -> int | None:
    """A descriptor of what must not be rotated; None for a regular file, or for nothing yet."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    # a socket, which cannot be opened; or a file that the shell writes to as well
    for stream in STREAMS:
        # it may be closed
        with suppress(OSError):
            if os.path.samestat(found, os.fstat(stream)):
                return os.dup(stream)
    if stat.S_ISREG(found.st_mode):
        return None
    # A named pipe that nobody reads is an error, and not a reason to wait.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def _as_text(descriptor: int) -> TextIOWrapper:
    return open(descriptor, "w", encoding="utf-8", errors="backslashreplace")


class _WrittenThrough(logging.StreamHandler[TextIOWrapper]):
    def close(self) -> None:
        super().close()
        self.stream.close()


class _PrivateFile(RotatingFileHandler):
    """A log that only its owner reads. Complains on stderr where the disk is full, and goes on."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, MODE)
        # another user's, who lets us write
        with suppress(PermissionError):
            os.fchmod(descriptor, MODE)
        return _as_text(descriptor)
