"""What methods take by arithmetic, each as it says itself."""

from __future__ import annotations

import math

from gradmap.costs.steps import Hardware
from gradmap.costs.timing import Pruning
from gradmap.methods.registry import compensator, selector
from gradmap.model.shape import Shape


def select_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float | None:
    """None for a selector whose costs are not known."""
    seconds = selector(pruning.selector).seconds
    return None if seconds is None else seconds(shape, hardware, pruning)


def repair_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float | None:
    """None for a compensator whose costs are not known."""
    seconds = compensator(pruning.compensator).seconds
    return None if seconds is None else seconds(shape, hardware, pruning)


def default_seconds(shape: Shape, hardware: Hardware, remove: int) -> float:
    """What the default selects and repairs in."""
    pruning = Pruning(remove)
    parts = select_seconds(shape, hardware, pruning), repair_seconds(shape, hardware, pruning)
    return math.fsum(part for part in parts if part is not None)
