"""How sentences are put together."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str], word: str) -> str:
    """Some names in a sentence: `a, b and c`, or with another word before the last."""
    *others, last = names
    return f"{', '.join(others)} {word} {last}" if others else last
