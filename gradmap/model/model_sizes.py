"""The sizes that config.json tells of a model which is run as it is, by whatever runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt

from gradmap.common.reading import checked, read_json_object
from gradmap.model.model_files import own_file


class _Sizes(BaseModel):
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt | None = None
    n_positions: PositiveInt | None = None
    num_hidden_layers: PositiveInt | None = None
    n_layer: PositiveInt | None = None


def read_sizes(directory: Path) -> dict[str, Any]:
    """The contents of config.json. Raises UserError if it has no vocab_size, or if one of its sizes
    is no number."""
    path = own_file(directory, "config.json")
    config = read_json_object(path)
    return config | checked(_Sizes, config, path).model_dump(exclude_none=True)


def context_length(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model takes at once, given the contents of its config.json; None if that
    sets no limit."""
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    return None if limit is None else int(limit)
