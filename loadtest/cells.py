"""What was measured, grouped once by where it belongs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from loadtest.records import Cell, Measurements

Item = TypeVar("Item")
Key = TypeVar("Key")


@dataclass(frozen=True)
class Cells:
    """by_cell: the measurements of every cell that has some, in the order in which they were
    taken."""

    by_cell: Mapping[Cell, Measurements]

    def at(self, cell: Cell) -> Measurements:
        """Empty where nothing was measured."""
        return self.by_cell.get(cell, Measurements())

    def pairs(self, arm: str, load: str) -> dict[int, Measurements]:
        """Pair -> what was measured of an arm at one load, in the order of the pairs. load: its
        name."""
        cells = sorted(cell for cell in self.by_cell if (cell.arm, cell.load) == (arm, load))
        return {cell.pair: self.by_cell[cell] for cell in cells}

    def of_pairs(self) -> Cells:
        """Without what belongs to no pair: the warm-up, and the search for the highest rate."""
        return Cells({cell: of_cell for cell, of_cell in self.by_cell.items() if cell.pair >= 0})


def group_cells(measured: Measurements) -> Cells:
    requests = grouped(measured.requests, lambda record: record.cell)
    blocks = grouped(measured.blocks, lambda record: record.cell)
    resources = grouped(measured.resources, lambda sample: sample.cell)
    by_cell = {}
    for cell in dict.fromkeys([*requests, *blocks, *resources]):
        by_cell[cell] = Measurements(
            tuple(requests.get(cell, ())),
            tuple(blocks.get(cell, ())),
            tuple(resources.get(cell, ())),
        )
    return Cells(by_cell)


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Key -> the items that have it, both in their first order."""
    groups: defaultdict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)
