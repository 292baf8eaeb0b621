"""The NVIDIA GPUs that CUDA shows to a process. NVML tells: CUDA itself would take memory from them
to answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pynvml

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Device:
    """A GPU, or a slice of one that is in MIG mode, for CUDA shows either as a device.

    handle: NVML's. card, card_uuid: of the whole GPU. gpu_instance, compute_instance: a slice's
    numbers on its card.
    """

    handle: Any
    uuid: str
    card: Any
    card_uuid: str
    gpu_instance: int | None = None
    compute_instance: int | None = None

    @property
    def is_slice(self) -> bool:
        return self.gpu_instance is not None

    @property
    def old_name(self) -> str:
        """A slice's name before drivers gave it a UUID of its own."""
        return f"MIG-{self.card_uuid}/{self.gpu_instance}/{self.compute_instance}"


@contextmanager
def visible_gpus(environment: Mapping[str, str]) -> Iterator[list[Device]]:
    """Yields the devices that CUDA shows to a process with this environment, in CUDA's order; none
    where no NVIDIA driver answers.

    Devices are good until the block ends. Numbers in CUDA_VISIBLE_DEVICES count as NVML and
    nvidia-smi do, by PCI address. CUDA does so with CUDA_DEVICE_ORDER=PCI_BUS_ID. Without, it puts
    the fastest first by a rule that is not published, which makes no difference where all GPUs are
    of one model.

    With GPUs in MIG mode, we follow drivers from R570 on. Older ones show a single slice, and no
    whole GPU beside it. How CUDA numbers slices beside whole GPUs is not documented: we put them
    last. UUIDs are sure.
    """
    devices: list[Device] = []
    with ExitStack() as closing:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            closing.callback(pynvml.nvmlShutdown)
            devices = _select(_list_devices(), environment.get(VISIBLE_VARIABLE))
        yield devices


def ask(question: Callable[..., Any], *details: Any) -> Any:
    """NVML's answer; None where it has none, for not every card tells everything."""
    with suppress(pynvml.NVMLError):
        return question(*details)
    return None


def _list_devices() -> list[Device]:
    """Whole GPUs, then slices. A GPU in MIG mode can be used through its slices only, and so is not
    in the list."""
    whole: list[Device] = []
    slices: list[Device] = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        # NVML counts GPUs that this process may not use.
        with suppress(pynvml.NVMLError):
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = pynvml.nvmlDeviceGetUUID(card)
            if _is_sliced(card):
                slices += _list_slices(card, uuid)
            else:
                whole.append(Device(card, uuid, card, uuid))
    return whole + slices


def _is_sliced(card: Any) -> bool:
    # The mode now, and the one after a reset.
    modes = ask(pynvml.nvmlDeviceGetMigMode, card)
    return modes is not None and modes[0] == pynvml.NVML_DEVICE_MIG_ENABLE


def _list_slices(card: Any, card_uuid: str) -> Iterator[Device]:
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        # There may be fewer, and a container has some of them.
        with suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index)
            uuid = pynvml.nvmlDeviceGetUUID(handle)
            instances = (
                pynvml.nvmlDeviceGetGpuInstanceId(handle),
                pynvml.nvmlDeviceGetComputeInstanceId(handle),
            )
            yield Device(handle, uuid, card, card_uuid, *instances)


def _select(devices: Sequence[Device], variable: str | None) -> list[Device]:
    """The devices that the variable selects, by CUDA's rules: the first entry that names nothing
    ends the list, and one that is repeated empties it. Numbers, GPUs' UUIDs and slices' UUIDs do
    not mix: the first entry says which of them are read."""
    if variable is None:
        return _one_per_instance(devices)
    entries = variable.split(",")
    chosen: list[Device] = []
    for entry in entries:
        device = _find(entry, devices) if _kind(entry) == _kind(entries[0]) else None
        if device is None:
            break
        chosen.append(device)
    repeated = len({device.uuid for device in chosen}) < len(chosen)
    return [] if repeated else _one_per_instance(chosen)


def _kind(entry: str) -> str:
    return entry[:4] if entry.startswith(("GPU-", "MIG-")) else "number"


def _find(entry: str, devices: Sequence[Device]) -> Device | None:
    """The device that an entry names. The beginning of a UUID will do if no other begins so. A GPU
    in MIG mode stands for the first of its slices."""
    if _kind(entry) == "MIG-":
        slices = [
            device
            for device in devices
            if device.uuid.startswith(entry) or device.old_name == entry
        ]
        return slices[0] if len(slices) == 1 else None
    if _kind(entry) == "GPU-":
        on_card = [device for device in devices if device.card_uuid.startswith(entry)]
        return on_card[0] if len({device.card_uuid for device in on_card}) == 1 else None
    numbered = _one_per_instance(devices)
    # As C's strtoul reads it: "1x" is 1.
    number = re.match(r"\s*\+?(\d+)", entry)
    return numbered[int(number[1])] if number and int(number[1]) < len(numbered) else None


def _one_per_instance(devices: Sequence[Device]) -> list[Device]:
    """CUDA shows one compute instance, the first, of each GPU instance."""
    first: dict[tuple[str, int | None], Device] = {}
    for device in devices:
        first.setdefault((device.card_uuid, device.gpu_instance), device)
    return list(first.values())
