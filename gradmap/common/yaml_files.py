"""Reads YAML that others wrote; apart from gradmap.common.reading, for most commands need none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gradmap.common.errors import UserError, first_line
from gradmap.common.reading import MALFORMED, read_text


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises UserError as `read_text` does, if it is not YAML, or if a
    key occurs twice."""
    text = read_text(path)
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    except MALFORMED as error:
        raise UserError(f"{path} is not usable YAML: {first_line(error)}.") from None


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML in which a key that occurs twice is an error, not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # Before the merge keys (<<) are filled in, which may repeat.
        keys = [key.value for key, _ in node.value]
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        twice = next((key for key in keys if isinstance(key, str) and keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} occurs twice", node.start_mark
            )
        return mapping
