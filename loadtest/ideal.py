"""The speed-up that the removed layers' weights would give if nothing else took time.

A decoding step reads every weight once, the input embeddings aside (a row of them), so TPOT follows
the bytes; a prompt passes through the layers only, so TTFT follows their FLOPs, and these their
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gradmap.common.errors import UserError
from gradmap.common.reading import read_json_object
from gradmap.model.architectures import architecture_of
from gradmap.model.safetensors_reader import list_tensors

INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
POSITION_EMBEDDINGS = ("embed_positions.weight", "wpe.weight")


@dataclass(frozen=True)
class WeightBytes:
    """layers: of all layers; head: of what else is read for every token."""

    layers: int
    head: int


def weight_bytes(directory: Path) -> WeightBytes | None:
    """From the headers of a model directory's weights; None where there is no such thing, or a
    family is unknown."""
    try:
        architecture = architecture_of(read_json_object(directory / "config.json"))
        tensors = [
            stored.spec
            for path in sorted(directory.glob("*.safetensors"))
            for stored in list_tensors(path)
        ]
    except UserError:
        return None
    tied = not any(spec.name.endswith("lm_head.weight") for spec in tensors)
    unread = POSITION_EMBEDDINGS if tied else (*INPUT_EMBEDDINGS, *POSITION_EMBEDDINGS)
    layers = sum(
        spec.bytes for spec in tensors if architecture.parse_tensor_name(spec.name) is not None
    )
    skipped = sum(spec.bytes for spec in tensors if spec.name.endswith(unread))
    return (
        WeightBytes(layers, sum(spec.bytes for spec in tensors) - layers - skipped)
        if layers
        else None
    )


def ideal_speed_ups(sizes: Mapping[str, WeightBytes], arm: str, against: str) -> dict[str, float]:
    """metric -> the ceiling; empty if the size of either is not known (a server that was already
    running)."""
    if arm not in sizes or against not in sizes:
        return {}
    large, small = sizes[against], sizes[arm]
    return {
        "tpot": (large.layers + large.head) / (small.layers + small.head),
        "ttft": large.layers / small.layers,
    }
