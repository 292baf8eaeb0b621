"""Whether an artifact is what was exported: its record, gradmap.json, and the SHA-256 of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradmap.console import waiting
from gradmap.errors import UserError
from gradmap.files import ARTIFACT_FILE, sha256_file
from gradmap.reading import read_json

SCHEMA_VERSION = 3


def read_record(directory: Path) -> dict[str, Any]:
    """Returns the contents of gradmap.json. Raises UserError if there is none, or one of another version."""
    record: dict[str, Any] = read_json(directory / ARTIFACT_FILE)
    if record.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{directory / ARTIFACT_FILE} is of another version of gradmap; export the artifact again.")
    return record


def require_files(directory: Path, hashes: dict[str, str]) -> None:
    """Raises UserError unless the directory holds exactly the files of `hashes` (hidden ones aside), unchanged."""
    present = {path.name for path in directory.iterdir() if not path.name.startswith(".")} - {ARTIFACT_FILE}
    for name, expected in hashes.items():
        if name not in present:
            raise UserError(f"{directory} lacks {name}; fetch the artifact again.")
        with waiting(f"Hashing {directory / name}"):
            found = sha256_file(directory / name)
        if found != expected:
            raise UserError(f"{directory / name} is not what was exported (its SHA-256 differs); fetch it again.")
    if foreign := sorted(present - hashes.keys()):
        raise UserError(f"{directory / foreign[0]} is not part of the artifact; remove it.")
