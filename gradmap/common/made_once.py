"""Checkpoints made of other files: made once, and kept in the cache directory as long as they stay
what they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from gradmap.common.console import waiting
from gradmap.common.files import atomic_directory, write_text
from gradmap.common.fingerprints import Stamp, find_change, fingerprint
from gradmap.common.locks import writing

CONFIG_FILE = "config.json"
# Hidden, so that it is no file of the checkpoint.
STAMPS_FILE = ".stamps"
_STAMPS = TypeAdapter(dict[str, Stamp])


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Returns `target` with what `make` put into the directory that it was given, now or before.

    It is made anew where one of its files is gone or was changed.
    """
    if not is_made(target):
        with writing(target, wait=True):
            # Somebody else may have made it meanwhile.
            if not is_made(target):
                # What is left of one that lost files goes, too.
                shutil.rmtree(target, ignore_errors=True)
                with atomic_directory(target, marker=CONFIG_FILE) as partial:
                    make(partial)
                    stamps = fingerprint([partial], partial)
                    write_text(partial / STAMPS_FILE, _STAMPS.dump_json(stamps).decode())
    return target


def is_made(target: Path) -> bool:
    """Whether what `made_once` makes at `target` is there, and what it was made as."""
    try:
        recorded = _STAMPS.validate_json((target / STAMPS_FILE).read_bytes())
    except (OSError, ValidationError):
        return False
    # By hash, where it is a copy.
    with waiting(f"Checking {target}"):
        return CONFIG_FILE in recorded and find_change(recorded, target) is None
