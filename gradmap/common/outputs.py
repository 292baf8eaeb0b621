"""Where results go, looked at before the work is done: whether they can be written there, and
whether nobody else does.

A result is replaced whole (a plan, an artifact, eval.json), or put into a directory one by one (a
run, a comparison, a load test). A symbolic link is written through.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gradmap.common.errors import UserError
from gradmap.common.failures import explain
from gradmap.common.locks import INNER_LOCK, writing, writing_into

# What our own files beside a result add to its name: .NAME.journal.json, and that one's partial
# file.
ROOM_BYTES = 40


@contextmanager
def output_directory(path: Path, marker: str) -> Iterator[None]:
    """Keeps a place for a directory that is replaced whole, whose earlier result holds a file named
    `marker`.

    Raises UserError if it cannot be, or if another process is at it.
    """
    with ExitStack() as stack:
        with _explained():
            place = _place(path)
            refuse_foreign_directory(path, marker)
            if Path.cwd().is_relative_to(place):
                raise UserError(
                    f"{path} is the working directory, which cannot be replaced; name another "
                    "directory."
                )
            stack.enter_context(writing(path))
        yield


@contextmanager
def output_file(path: Path) -> Iterator[None]:
    """Keeps a place for a file. Raises UserError if it cannot be written, or if another process is
    at it."""
    with ExitStack() as stack:
        with _explained():
            if _place(path).is_dir():
                raise UserError(f"{path} is a directory; name a file for the output.")
            stack.enter_context(writing(path))
        yield


@contextmanager
def results_in(directory: Path, marker: str) -> Iterator[None]:
    """Keeps a place for a directory that results are put into; it is made. Raises UserError as
    `output_directory` does."""
    with ExitStack() as stack:
        with _explained():
            _place(directory)
            refuse_foreign_directory(directory, marker)
            stack.enter_context(writing_into(directory))
        yield


def refuse_foreign_directory(path: Path, marker: str) -> None:
    """Raises UserError if `path` holds something that is not an earlier result (recognised by its
    `marker` file)."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a directory for the output.")
    if (
        path.is_dir()
        and not (path / marker).exists()
        and any(entry.name != INNER_LOCK for entry in path.iterdir())
    ):
        raise UserError(
            f"{path} is not empty and holds no {marker}, so it will not be overwritten; name "
            "another directory."
        )


def _place(path: Path) -> Path:
    """Where the result will be, links followed. Raises UserError if nothing can be there."""
    place = Path(os.path.realpath(path))
    existing = next(parent for parent in place.parents if parent.exists())
    longest = os.pathconf(existing, "PC_NAME_MAX") - ROOM_BYTES
    if len(os.fsencode(place.name)) > longest:
        raise UserError(f"{path}: the name is longer than {longest} bytes; name another place.")
    if place.is_symlink():
        raise UserError(f"{path} is a symbolic link that leads back to itself; name another place.")
    if not existing.is_dir():
        raise UserError(
            f"{existing} is a file, so that {path} cannot be in it; name another place."
        )
    return place


@contextmanager
def _explained() -> Iterator[None]:
    """Says in one sentence what the file system refuses."""
    try:
        yield
    except OSError as error:
        raise explain(error) or error from None
