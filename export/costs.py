"""How long an export takes, with its verification: mostly processes that start, and what they do
once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export.formats import FORMATS
from export.formats.format import CALIBRATED, Format
from export.formats.gguf import REQUANTISED
from export.reference import GREEDY_TOKENS, PROBE_SAMPLES, PROBE_TOKENS
from export.runners.probe_io import MEMORY_SHARE
from export.writers import JUDGING_SAMPLES, JUDGING_TOKENS
from gradmap.costs.footprint import FLOAT32_BYTES, RUNTIME_BYTES
from gradmap.costs.speed import Disk
from gradmap.costs.steps import Hardware
from gradmap.costs.timing import STARTING_S, generation_seconds
from gradmap.model.shape import Shape

# How often the probe passes the model in the process that verifies: with and without a cache.
PASSES_OF_CHILD = 2
# What a quantisation multiplies while it looks at samples, in passes of them through the layers:
# GPTQ one with the weights, one with those that are rounded, and as much for what enters each map.
CALIBRATION_PASSES = dict.fromkeys(CALIBRATED, 3) | dict.fromkeys(REQUANTISED, 1)


@dataclass(frozen=True)
class ExportSize:
    """formats; roundings: how many different dtypes weights are rounded to, none being one;
    check_vllm: whether vLLM itself verifies. calibration_tokens: that quantisation may look at."""

    formats: Sequence[str]
    roundings: int = 1
    check_vllm: bool = True
    quantise: str | None = None
    calibration_tokens: int = 0

    @property
    def positions(self) -> int:
        """What an artifact is compared at."""
        if self.quantise is None:
            return PROBE_SAMPLES * PROBE_TOKENS
        return JUDGING_SAMPLES * JUDGING_TOKENS


def export_seconds(shape: Shape, cpu: Hardware, size: ExportSize, layers: int, disk: Disk) -> float:
    """cpu: in float32, which all verification but vLLM's computes in. A model that does not fit is
    read from disk for every pass, and generates nothing."""
    weights = FLOAT32_BYTES * shape.parameters(layers)
    pass_s = size.positions * shape.forward_flops(layers) / cpu.sustained_flops
    greedy_s = generation_seconds(shape, cpu, GREEDY_TOKENS, 1, layers)
    if weights > MEMORY_SHARE * cpu.memory:
        pass_s, greedy_s = pass_s + weights / disk.read, 0.0
    reference_s = weights / disk.read + pass_s + greedy_s
    child_s = STARTING_S + weights / disk.read + PASSES_OF_CHILD * pass_s + greedy_s
    seconds = STARTING_S + size.roundings * reference_s
    seconds += _calibration_seconds(shape, cpu, size, layers)
    for form in known_formats(size):
        at_once = [
            max(child_s, runner.least_s)
            for runner in form.runners
            if size.check_vllm or not runner.optional
        ]
        seconds += weights / disk.read + weights / disk.write + max(at_once)
        if form.conversion_s_per_layer is not None:
            seconds += STARTING_S + form.conversion_s_per_layer * layers
    return seconds


def _calibration_seconds(shape: Shape, cpu: Hardware, size: ExportSize, layers: int) -> float:
    passes = CALIBRATION_PASSES.get(size.quantise or "", 0)
    tokens_s = size.calibration_tokens * shape.layer_flops(layers) / cpu.sustained_flops
    return STARTING_S + passes * tokens_s if passes else 0.0


def export_bytes(shape: Shape, cpu: Hardware, size: ExportSize, layers: int) -> float:
    """The model in float32, or the part that fits; some conversions hold it whole, several
    times."""
    weights = FLOAT32_BYTES * shape.parameters(layers)
    converted = weights * max((form.memory_factor for form in known_formats(size)), default=0)
    return RUNTIME_BYTES + (converted or min(weights, MEMORY_SHARE * cpu.memory))


def known_formats(size: ExportSize) -> list[Format]:
    """Those of its formats that there are: a name that is none is refused when it is exported."""
    return [FORMATS[name] for name in size.formats if name in FORMATS]
