"""How long an export takes, with its verification: mostly processes that start, and what they do
once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export.reference import GREEDY_TOKENS, PROBE_SAMPLES, PROBE_TOKENS
from export.runners.probe_io import MEMORY_SHARE
from export.writers import ONNX_MEMORY_FACTOR
from gradmap.costs.footprint import FLOAT32_BYTES, RUNTIME_BYTES
from gradmap.costs.speed import Disk
from gradmap.costs.steps import STARTING_S, Hardware, generation_seconds
from gradmap.model.shape import Shape

# How often the probe passes the model in the process that verifies: with and without a cache.
PASSES_OF_CHILD = 2
# vLLM's CPU build, started without compiling, and asked once: SmolLM2 on two cores of an EPYC, what
# is left of the 80 s of an export in vLLM's format (benchmarks.end_to_end) without the rest.
VLLM_CHECK_S = 50.0
# torch's exporter: 65 s for SmolLM2's 22 layers on such a core (benchmarks.onnx_export).
TRACING_S_PER_LAYER = 3.0


@dataclass(frozen=True)
class ExportSize:
    """formats; roundings: how many different dtypes weights are rounded to, none being one;
    check_vllm: whether vLLM itself verifies."""

    formats: Sequence[str]
    roundings: int = 1
    check_vllm: bool = True


def export_seconds(shape: Shape, cpu: Hardware, size: ExportSize, layers: int, disk: Disk) -> float:
    """cpu: in float32, which all verification but vLLM's computes in. A model that does not fit is
    read from disk for every pass, and generates nothing."""
    weights = FLOAT32_BYTES * shape.parameters(layers)
    pass_s = PROBE_SAMPLES * PROBE_TOKENS * shape.forward_flops(layers) / cpu.sustained_flops
    greedy_s = generation_seconds(shape, cpu, GREEDY_TOKENS, 1, layers)
    if weights > MEMORY_SHARE * cpu.memory:
        pass_s, greedy_s = pass_s + weights / disk.read, 0.0
    reference_s = weights / disk.read + pass_s + greedy_s
    child_s = STARTING_S + weights / disk.read + PASSES_OF_CHILD * pass_s + greedy_s
    seconds = STARTING_S + size.roundings * reference_s
    for name in size.formats:
        by_vllm_too = name == "vllm" and size.check_vllm
        seconds += weights / disk.read + weights / disk.write
        seconds += max(child_s, VLLM_CHECK_S) if by_vllm_too else child_s  # at once
        seconds += STARTING_S + TRACING_S_PER_LAYER * layers if name == "onnx" else 0.0
    return seconds


def export_bytes(shape: Shape, cpu: Hardware, size: ExportSize, layers: int) -> float:
    """The model in float32, or the part that fits; an ONNX export holds it several times."""
    weights = FLOAT32_BYTES * shape.parameters(layers)
    needed = min(weights, MEMORY_SHARE * cpu.memory)
    if any(name.startswith("onnx") for name in size.formats):
        needed = ONNX_MEMORY_FACTOR * weights
    return RUNTIME_BYTES + needed
