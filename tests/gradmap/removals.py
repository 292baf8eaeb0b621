"""What tests remove, written shortly."""

from gradmap.model.sublayers import Pair, Part, Sublayer


def pairs(*written: int | str) -> tuple[Pair, ...]:
    """Layers by their numbers, and other pairs as "M0+A1"."""
    return tuple(map(Pair.parse, written))


def ffn(layer: int) -> Sublayer:
    return Sublayer(layer, Part.FFN)


def attention(layer: int) -> Sublayer:
    return Sublayer(layer, Part.ATTENTION)
