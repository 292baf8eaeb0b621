"""Which tokens end an answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmap.common.errors import UserError
from gradmap.common.reading import read_json_object
from gradmap.model.model_files import own_file

GENERATION_FILE = "generation_config.json"


def end_tokens(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a generation of a model: those of generation_config.json, as transformers
    and vLLM take them, or of `config`, its config.json, where that names none. Raises UserError if
    they are no ids."""
    path = own_file(directory, GENERATION_FILE)
    found = read_json_object(path).get("eos_token_id") if path.exists() else None
    if found is None:
        path, found = directory / "config.json", config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise UserError(
            f"{path}: eos_token_id is {found!r}, which is neither a token id nor a list of them."
        )
    return tuple(ids)


def until_end(answer: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens before the first one that ends the answer."""
    place = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    return list(answer[:place])
