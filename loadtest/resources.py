"""What the machine does while a load runs: processors and memory through psutil, NVIDIA GPUs
through NVML."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import psutil
import pynvml

from gradmap.common.gpus import Device, ask, visible_gpus
from loadtest.metrics import count_tokens
from loadtest.records import Cell, GpuSample, Measurements, ResourceSample

INTERVAL_S = 0.5
# Reasons for lower clocks that say a measurement is not what the card can do; idling and set limits
# are none.
THROTTLING = (
    pynvml.nvmlClocksThrottleReasonHwSlowdown
    | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    | pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
)


@dataclass(frozen=True)
class ResourceUse:
    """What one arm used at one load, over all blocks. Shares are 0 to 1; None where there is no
    GPU, or it does not tell.

    Means, but of memory the most. GPUs are averaged, their memory, power and energy added.
    energy_per_token_j: joules of the GPUs while the load ran, over the tokens it generated.
    """

    cpu: float
    memory_bytes: int
    gpu: float | None
    gpu_memory_bytes: int | None
    gpu_power_w: float | None
    gpu_clock_mhz: float | None
    throttled: float | None
    energy_per_token_j: float | None


@dataclass(frozen=True)
class Use:
    """A field of ResourceUse, by what people call it. unit: in which it is shown; factor: to it,
    from the unit of the field."""

    key: str
    label: str
    unit: str
    factor: float

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})"


# What is shown of it.
USES = (
    Use("cpu", "processors busy", "%", 1e2),
    Use("memory_bytes", "memory in use", "GB", 1e-9),
    Use("gpu", "GPU busy", "%", 1e2),
    Use("gpu_memory_bytes", "GPU memory", "GB", 1e-9),
    Use("gpu_power_w", "GPU power", "W", 1.0),
    Use("gpu_clock_mhz", "GPU clock", "MHz", 1.0),
    Use("throttled", "GPU throttled", "% of the time", 1e2),
    Use("energy_per_token_j", "GPU energy per token", "J", 1.0),
)


@contextmanager
def sampled(cell: Cell) -> Iterator[list[ResourceSample]]:
    """Samples every half second from beginning to end of a load, in a thread; the list is whole
    afterwards.

    GPUs are those that this process may use, as may a server that it starts. Of one that it is
    given the URL of, that is a guess.
    """
    samples: list[ResourceSample] = []
    ended = threading.Event()
    psutil.cpu_percent()  # counts from here
    with visible_gpus(os.environ) as gpus:

        def sample_until_ended() -> None:
            while not ended.wait(INTERVAL_S):
                samples.append(_sample_machine(cell, gpus))

        thread = threading.Thread(target=sample_until_ended, daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            ended.set()
            thread.join()


def _sample_machine(cell: Cell, gpus: Sequence[Device]) -> ResourceSample:
    return ResourceSample(
        arm=cell.arm,
        pair=cell.pair,
        load=cell.load,
        time_s=time.monotonic(),
        cpu=psutil.cpu_percent() / 100,
        memory_bytes=psutil.virtual_memory().used,
        gpus=tuple(map(_sample_gpu, gpus)),
    )


def _sample_gpu(gpu: Device) -> GpuSample:
    """What a GPU tells. A slice tells its memory alone: its power would be that of the whole card,
    neighbours included."""
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, gpu.handle)
    memory_bytes = None if memory is None else memory.used
    if gpu.is_slice:
        return GpuSample(
            utilisation=None,
            memory_bytes=memory_bytes,
            power_w=None,
            clock_mhz=None,
            throttled=None,
        )
    use = ask(pynvml.nvmlDeviceGetUtilizationRates, gpu.handle)
    milliwatts = ask(pynvml.nvmlDeviceGetPowerUsage, gpu.handle)
    reasons = ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu.handle)
    return GpuSample(
        utilisation=None if use is None else use.gpu / 100,
        memory_bytes=memory_bytes,
        power_w=None if milliwatts is None else milliwatts / 1000,
        clock_mhz=ask(pynvml.nvmlDeviceGetClockInfo, gpu.handle, pynvml.NVML_CLOCK_SM),
        throttled=None if reasons is None else bool(reasons & THROTTLING),
    )


def summarise_resources(blocks: Iterable[Measurements]) -> ResourceUse | None:
    """What the blocks of one arm at one load used while requests were under way; None if that was
    too short for a sample."""
    samples: list[ResourceSample] = []
    seconds, tokens = 0.0, 0
    for block in blocks:
        if block.requests:
            begin_s = min(record.sent_s for record in block.requests)
            end_s = max(record.ended_s for record in block.requests)
            samples += _between(block.resources, begin_s, end_s)
            seconds += end_s - begin_s
            tokens += count_tokens(block.requests)
    return _summarise(samples, seconds, tokens) if samples else None


def _between(
    samples: Sequence[ResourceSample], begin_s: float, end_s: float
) -> list[ResourceSample]:
    return [sample for sample in samples if begin_s <= sample.time_s <= end_s]


def _summarise(samples: Sequence[ResourceSample], seconds: float, tokens: int) -> ResourceUse:
    power_w = _over_gpus(samples, "power_w", sum)
    return ResourceUse(
        cpu=mean(sample.cpu for sample in samples),
        memory_bytes=max(sample.memory_bytes for sample in samples),
        gpu=_mean(_over_gpus(samples, "utilisation", mean)),
        gpu_memory_bytes=max(_over_gpus(samples, "memory_bytes", sum), default=None),
        gpu_power_w=_mean(power_w),
        gpu_clock_mhz=_mean(_over_gpus(samples, "clock_mhz", mean)),
        throttled=_mean(_over_gpus(samples, "throttled", max)),
        energy_per_token_j=mean(power_w) * seconds / tokens if power_w and tokens else None,
    )


def _over_gpus(
    samples: Sequence[ResourceSample], name: str, combine: Callable[[list[Any]], Any]
) -> list[Any]:
    """One value for each sample in which every GPU told it: a sum over some of them would be no
    sum."""
    combined = []
    for sample in samples:
        told = [getattr(gpu, name) for gpu in sample.gpus]
        if told and None not in told:
            combined.append(combine(told))
    return combined


def _mean(values: Sequence[float]) -> float | None:
    return float(mean(values)) if values else None
