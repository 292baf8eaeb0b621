"""A decoder as the sequence of its sublayers: attention 0, FFN 0, attention 1, FFN 1, and so on.

Whichever two neighbours of that sequence go, what is left still alternates and so is a decoder of
the same kind, with a layer less. Two neighbours are a layer, or the FFN of one and the attention of
the next: a shifted pair, after which the attention before it and the FFN behind it are one layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from enum import IntEnum
from itertools import chain
from typing import Any, Literal, NamedTuple

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class Part(IntEnum):
    """What a sublayer is, in the order in which a layer has them."""

    ATTENTION = 0
    FFN = 1


class Sublayer(NamedTuple):
    """The attention or the FFN of a layer (original index), with the norms that belong to it. Of
    two, the one that comes first is the smaller."""

    layer: int
    part: Part

    def __str__(self) -> str:
        return f"{'AM'[self.part]}{self.layer}"

    @property
    def words(self) -> str:
        return f"the {'FFN' if self.part else 'attention'} of layer {self.layer}"

    @classmethod
    def parse(cls, text: str) -> Sublayer:
        """Reads A7, the attention of layer 7, or M7, its FFN. Raises ValueError."""
        letter, number = text[:1], text[1:]
        if letter not in ("A", "M") or not number.isascii() or not number.isdigit():
            raise ValueError(f"{text!r} is no sublayer such as A7 or M7")
        return cls(int(number), Part("AM".index(letter)))


class Pair(NamedTuple):
    """Two sublayers that are neighbours where they are removed.

    Written as the number of the layer, if they are the two of one; else as M7+A8.
    """

    first: Sublayer
    second: Sublayer

    @classmethod
    def of_layer(cls, layer: int) -> Pair:
        return cls(Sublayer(layer, Part.ATTENTION), Sublayer(layer, Part.FFN))

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer of the model as it was."""
        return self == Pair.of_layer(self.first.layer)

    def is_in(self, layers: Collection[int]) -> bool:
        """Whether one of its sublayers is of one of these layers."""
        return self.first.layer in layers or self.second.layer in layers

    @property
    def words(self) -> str:
        return f"layer {self}" if self.is_layer else str(self)

    @property
    def written(self) -> int | str:
        """As JSON has it: the number of a layer, and of any other pair its name."""
        return self.first.layer if self.is_layer else str(self)

    def __str__(self) -> str:
        return str(self.first.layer) if self.is_layer else f"{self.first}+{self.second}"

    def __repr__(self) -> str:
        return str(self)

    @classmethod
    def parse(cls, given: Any) -> Pair:
        """Reads 7, "7" or "M7+A8". Raises ValueError."""
        if isinstance(given, Pair):
            return given
        text = str(given)
        if text.isascii() and text.isdigit():
            return cls.of_layer(int(text))
        first, plus, second = text.partition("+")
        if not plus:
            raise ValueError(f"{text!r} is neither a layer such as 7 nor a pair such as M7+A8")
        pair = cls(Sublayer.parse(first), Sublayer.parse(second))
        if not (pair.first < pair.second and pair.first.part != pair.second.part):
            raise ValueError(f"{text!r} is no attention and FFN in the order of the model")
        return pair

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """In JSON a layer is a number, and anything else a text."""
        written = core_schema.union_schema([core_schema.int_schema(), core_schema.str_schema()])
        return core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_after_validator_function(cls.parse, written),
            python_schema=core_schema.no_info_plain_validator_function(cls.parse),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda pair: pair.written
            ),
        )


class JoinedLayer(NamedTuple):
    """A layer of the pruned model: whose attention and whose FFN it has (original indices)."""

    attention: int
    ffn: int

    def __str__(self) -> str:
        if self.attention == self.ffn:
            return str(self.ffn)
        return f"A{self.attention}+M{self.ffn}"


# What goes at a time: whole layers, or any two neighbours of what is left.
Unit = Literal["layer", "pair"]
# How many pieces a unit is made of: a layer is one piece, or its sublayers are one each.
PIECES: dict[Unit, int] = {"layer": 1, "pair": 2}


def sublayers_of(layers: Iterable[int]) -> list[Sublayer]:
    """Both of each of these layers, in order."""
    return [Sublayer(layer, part) for layer in layers for part in Part]


def sublayers_left(layers: int, removed: Iterable[Pair]) -> list[Sublayer]:
    """Those of a model with so many layers that were not removed, in order."""
    gone = set(chain.from_iterable(removed))
    return [sublayer for sublayer in sublayers_of(range(layers)) if sublayer not in gone]


def joined_layers(layers: int, removed: Iterable[Pair]) -> list[JoinedLayer]:
    """The layers of what is left. Raises ValueError if it does not alternate."""
    left = sublayers_left(layers, removed)
    parts = [sublayer.part for sublayer in left]
    if parts != [Part.ATTENTION, Part.FFN] * (len(left) // 2):
        raise ValueError("what is left does not alternate between attention and FFN")
    return [
        JoinedLayer(attention.layer, ffn.layer)
        for attention, ffn in zip(left[::2], left[1::2], strict=True)
    ]


def places_of_left(layers: int, removed: Iterable[Pair]) -> dict[Sublayer, int]:
    """The layer of what is left that each sublayer is of. Raises ValueError if it does not
    alternate."""
    return {
        Sublayer(layer[part], part): place
        for place, layer in enumerate(joined_layers(layers, removed))
        for part in Part
    }


def originals(layers: int, removed: Iterable[Pair]) -> dict[Sublayer, Sublayer]:
    """What each sublayer of what is left was in the model as it was. Raises ValueError if what is
    left does not alternate."""
    places = places_of_left(layers, removed)
    return {Sublayer(place, original.part): original for original, place in places.items()}


def pieces(left: Sequence[Sublayer], unit: Unit) -> list[Sequence[Sublayer]]:
    """What is left, cut where a unit may begin: into layers, or sublayers."""
    step = 2 // PIECES[unit]
    return [left[start : start + step] for start in range(0, len(left), step)]


def candidates(left: Sequence[Sublayer], unit: Unit) -> list[Pair]:
    """What could go next, front to back: the layers of what is left, or any two neighbours."""
    step = 2 // PIECES[unit]
    return [Pair(*left[start : start + 2]) for start in range(0, len(left) - 1, step)]


def are_neighbours(layers: int, order: Sequence[Pair]) -> bool:
    """Whether each pair is there, and together, once those before it are gone."""
    left = sublayers_of(range(layers))
    for pair in order:
        if pair.first not in left:
            return False
        place = left.index(pair.first)
        if left[place + 1 : place + 2] != [pair.second]:
            return False
        del left[place : place + 2]
    return True
