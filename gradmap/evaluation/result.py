"""eval.json, for whoever puts its numbers beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradmap.errors import UserError
from gradmap.reading import read_json

# 3: segments are of joined rows in their order, and begin with BOS where the tokenizer puts one.
SCHEMA_VERSION = 3


def read_evaluation(path: Path) -> dict[str, Any]:
    """Raises UserError if it is missing, or of another schema: its perplexities are then of other segments."""
    contents = read_json(path)
    version = contents.get("schema_version") if isinstance(contents, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has evaluation schema {version}, this version reads {SCHEMA_VERSION}: the perplexities of the two "
            "cannot be compared; evaluate again."
        )
    evaluation: dict[str, Any] = contents
    return evaluation
