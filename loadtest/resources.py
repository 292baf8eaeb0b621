"""What the machine does while a load runs: processors and memory through psutil, NVIDIA GPUs
through NVML."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import psutil
import pynvml

from gradmap.common.gpus import Device, ask, visible_gpus
from loadtest.records import GpuSample, Measurements, RequestRecord, ResourceSample

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
    """Of one arm at one load, over all blocks. Shares are 0 to 1; None where there is no GPU, or it
    does not tell.

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


@contextmanager
def sampled(arm: str, pair: int, load: str) -> Iterator[list[ResourceSample]]:
    """Samples every half second from beginning to end of the block, in a thread; the list is whole
    afterwards.

    GPUs are those that this process may use, as may a server that it starts. Of one that it is
    given the URL of, that is a guess.
    """
    samples: list[ResourceSample] = []
    ended = threading.Event()
    psutil.cpu_percent()  # counts from here
    with visible_gpus(os.environ) as gpus:

        def sample() -> None:
            while not ended.wait(INTERVAL_S):
                samples.append(
                    ResourceSample(
                        **{"arm": arm, "pair": pair, "load": load, "time_s": time.monotonic()},
                        cpu=psutil.cpu_percent() / 100,
                        memory_bytes=psutil.virtual_memory().used,
                        gpus=tuple(map(_sample_gpu, gpus)),
                    )
                )

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            ended.set()
            thread.join()


def _sample_gpu(gpu: Device) -> GpuSample:
    """Of a slice, only the memory is its own: its power would be that of the whole card, neighbours
    included."""
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


def summarise_resources(measured: Measurements, arm: str, load: str) -> ResourceUse | None:
    """While requests were under way; None if that was too short for a sample."""
    records = [record for record in measured.requests if (record.arm, record.load) == (arm, load)]
    windows = {
        pair: (min(one.sent_s for one in block), max(one.ended_s for one in block))
        for pair in {record.pair for record in records}
        if (block := [record for record in records if record.pair == pair])
    }
    samples = [
        sample
        for sample in measured.resources
        if (sample.arm, sample.load) == (arm, load)
        and sample.pair in windows
        and windows[sample.pair][0] <= sample.time_s <= windows[sample.pair][1]
    ]
    return (
        _summarise(samples, sum(end - begin for begin, end in windows.values()), records)
        if samples
        else None
    )


def _summarise(
    samples: Sequence[ResourceSample], seconds: float, records: Sequence[RequestRecord]
) -> ResourceUse:
    power_w = _over_gpus(samples, "power_w", sum)
    tokens = sum(record.completion_tokens for record in records)
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
    told = [[getattr(gpu, name) for gpu in sample.gpus] for sample in samples]
    return [combine(values) for values in told if values and None not in values]


def _mean(values: Sequence[float]) -> float | None:
    return float(mean(values)) if values else None
