"""Writes the tables of methods into docs/methods.md, as the methods describe themselves.

python -m scripts.write_method_tables docs/methods.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from gradmap.methods.registry import compensator, compensator_names, selector, selector_names


def tables() -> dict[str, str]:
    """The tables by the name of the place that they stand in."""
    return {"selectors": selector_table(), "compensators": compensator_table()}


def selector_table() -> str:
    methods = [selector(name) for name in selector_names()]
    return _table(
        ("name", "what goes first", "from", "streams", "one round takes"),
        (
            (f"`{it.name}`", it.about, it.paper or "ours", _no_if(it.in_memory), it.round_takes)
            for it in methods
        ),
    )


def compensator_table() -> str:
    methods = [compensator(name) for name in compensator_names()]
    return _table(
        ("name", "what it does", "from", "streams", "mixture of experts"),
        (
            (
                f"`{it.name}`",
                it.about,
                it.paper or "ours",
                _no_if(it.in_memory),
                _no_if(bool(it.no_experts)),
            )
            for it in methods
        ),
    )


def fill(page: str) -> str:
    """The page with each table between the comments that mark its place."""
    for place, table in tables().items():
        start, end = f"<!-- {place} -->", f"<!-- end of {place} -->"
        pieces = re.split(f"{start}.*?{end}", page, flags=re.DOTALL)
        assert len(pieces) == 2, f"no place for the table of {place}"
        page = f"{start}\n{table}{end}".join(pieces)
    return page


def _no_if(condition: bool) -> str:
    return "no" if condition else "yes"


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(fill(target.read_text()))
