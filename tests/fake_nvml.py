"""NVML with GPUs that are not there. A handle is the Card or the Slice itself."""

# ruff: noqa: N802
from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pynvml

GIB = 2**30
MOST_SLICES = 7


@dataclass(frozen=True)
class Slice:
    """What NVML calls a MIG device. gpu, compute: numbers of its instances."""

    uuid: str
    gpu: int = 1
    compute: int = 0
    total_bytes: int = 10 * GIB


@dataclass(frozen=True)
class Card:
    """slices: of a GPU in MIG mode; None for one that is not. forbidden: NVML counts it and gives
    no handle of it."""

    uuid: str
    total_bytes: int = 80 * GIB
    capability: tuple[int, int] = (9, 0)
    slices: tuple[Slice, ...] | None = None
    forbidden: bool = False


@dataclass
class FakeNvml:
    """cards: in the order of NVML. opened: how many times it is initialised and not shut down."""

    cards: tuple[Card, ...]
    opened: int = 0

    def install(self, monkeypatch):
        for name in dir(self):
            if name.startswith("nvml"):
                monkeypatch.setattr(pynvml, name, self._while_open(name))

    def _while_open(self, name):
        def answer(*details):
            if not (self.opened or name == "nvmlInit"):
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
            return getattr(self, name)(*details)

        return answer

    def nvmlInit(self):
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        if self.cards[index].forbidden:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return self.cards[index]

    def nvmlDeviceGetUUID(self, handle):
        return handle.uuid

    def nvmlDeviceGetMigMode(self, card):
        if card.slices is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [pynvml.NVML_DEVICE_MIG_ENABLE] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, card):
        return MOST_SLICES

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card, index):
        if index >= len(card.slices):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return card.slices[index]

    def nvmlDeviceGetGpuInstanceId(self, handle):
        return handle.gpu

    def nvmlDeviceGetComputeInstanceId(self, handle):
        return handle.compute

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=handle.total_bytes, used=handle.total_bytes // 2)

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self._of_whole(handle, handle.capability if isinstance(handle, Card) else None)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return self._of_whole(handle, SimpleNamespace(gpu=50))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._of_whole(handle, pynvml.nvmlClocksThrottleReasonGpuIdle)

    def nvmlDeviceGetPowerUsage(self, handle):
        return 300_000  # milliwatts; of a slice too, of which it is the whole card's

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return 1500

    def _of_whole(self, handle, value):
        if isinstance(handle, Slice):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value
