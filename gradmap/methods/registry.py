"""Methods by name, ours and those of other installed packages: all are entry points. A method is
imported when it is asked for, and none for the list of their names."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from gradmap.common.errors import UserError

if TYPE_CHECKING:
    from gradmap.methods.base import Compensator, Selector

SELECTORS, COMPENSATORS = "gradmap.selectors", "gradmap.compensators"


def selector_names() -> list[str]:
    return list(_entries(SELECTORS))


def compensator_names() -> list[str]:
    return list(_entries(COMPENSATORS))


def selector(name: str) -> Selector:
    """Raises UserError if there is none of that name."""
    found: Selector = _load(SELECTORS, "selector", name)
    return found


def compensator(name: str) -> Compensator:
    """Raises UserError if there is none of that name."""
    found: Compensator = _load(COMPENSATORS, "compensator", name)
    return found


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    """By name. Raises UserError if two packages have one of the same name."""
    entries: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        known = entries.setdefault(entry.name, entry)
        if known.value != entry.value:
            raise UserError(
                f"Two installed packages have a {group} called {entry.name} ({known.value} and "
                f"{entry.value}); uninstall one of them."
            )
    return entries


def _load(group: str, kind: str, name: str) -> Any:
    entries = _entries(group)
    if name not in entries:
        raise UserError(f"Unknown {kind} {name!r}; known are {', '.join(entries)}.")
    method = entries[name].load()
    if method.name != name:
        raise UserError(
            f"The entry point {name} of {group} is the {kind} {method.name}; install a version of "
            "its package where both agree."
        )
    return method
