"""What this machine can do, looked up and measured in seconds: cores, products, memory, GPUs,
packages, disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import psutil
import pynvml
import torch

from gradmap.common.environment import cpu_model
from gradmap.common.files import cache_directory
from gradmap.common.gpus import Device, ask, visible_gpus
from gradmap.common.machine import available_bytes, usable_cores, warn_if_threads_hinder
from gradmap.costs.speed import Disk, measure_disk, memory_bandwidth, product_rates
from gradmap.model.precision import fastest_dtype

# That lower what torch and oneDNN use of a CPU.
ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU. memory_bytes, capability: None where NVML does not tell. visible: whether CUDA shows
    it to this process."""

    name: str
    memory_bytes: int | None
    capability: str | None
    visible: bool


@dataclass(frozen=True)
class Machine:
    """A machine. cores: that this process may keep busy, of all_cores; threads: that torch takes.
    isa: what torch uses; limits: variables that lower that.

    gflops, bandwidth (bytes per second), auto: of `device`, what gradmap computes on. auto: what
    dtype `auto` is for weights that are stored in bfloat16. packages: versions. providers: ONNX
    Runtime's.
    """

    cpu: str
    cores: int
    all_cores: int
    threads: int
    isa: str
    limits: Mapping[str, str]
    memory_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...]
    device: str
    gflops: Mapping[str, float]
    auto: str
    bandwidth: float
    packages: Mapping[str, str]
    providers: tuple[str, ...]
    disk: Disk


def examine_machine() -> Machine:
    """What this machine can do. Takes about two seconds."""
    warn_if_threads_hinder()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return Machine(
        cpu=cpu_model(),
        cores=usable_cores(),
        all_cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        isa=torch.backends.cpu.get_cpu_capability(),
        limits={name: os.environ[name] for name in ISA_VARIABLES if name in os.environ},
        memory_bytes=psutil.virtual_memory().total,
        available_bytes=available_bytes(),
        gpus=find_gpus(),
        device=device,
        gflops=dict(product_rates(device).by_dtype),
        auto=fastest_dtype("bfloat16", device),
        bandwidth=memory_bandwidth(device),
        packages=find_packages(),
        providers=find_providers(),
        disk=measure_disk(cache_directory()),
    )


def find_gpus(environment: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """All GPUs that NVML knows."""
    with visible_gpus(environment) as devices:
        visible = {device.uuid for device in devices}
    with visible_gpus({}) as devices:
        return tuple(_describe_device(device, device.uuid in visible) for device in devices)


def _describe_device(device: Device, visible: bool) -> Gpu:
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, device.handle)
    return Gpu(
        name=str(ask(pynvml.nvmlDeviceGetName, device.handle) or device.uuid),
        memory_bytes=getattr(memory, "total", None),
        capability=_as_version(ask(pynvml.nvmlDeviceGetCudaComputeCapability, device.card)),
        visible=visible,
    )


def find_packages() -> dict[str, str]:
    """Versions by name; of vLLM and ONNX Runtime, whichever build there is."""
    distributions = packages_distributions()
    names = [
        "torch",
        "transformers",
        *distributions.get("vllm", ()),
        *distributions.get("onnxruntime", ()),
    ]
    found = {}
    for name in dict.fromkeys(names):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def find_providers() -> tuple[str, ...]:
    """The providers that ONNX Runtime can run with; none if it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return ()
    return tuple(onnxruntime.get_available_providers())


def machine_rows(machine: Machine) -> list[tuple[str, str]]:
    """The rows of `gradmap doctor`'s table: what, and what it is."""
    limits = "".join(f", {name}={value}" for name, value in machine.limits.items())
    rates = ", ".join(f"{dtype} {rate:,.0f}" for dtype, rate in machine.gflops.items())
    disk = machine.disk
    return [
        ("CPU", machine.cpu),
        ("cores", f"{machine.cores} of {machine.all_cores}, torch takes {machine.threads}"),
        ("instructions", f"{machine.isa}{limits}"),
        (
            "memory",
            f"{machine.available_bytes / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB "
            "available",
        ),
        *((f"GPU {number}", _describe_gpu(gpu)) for number, gpu in enumerate(machine.gpus)),
        ("computes on", machine.device),
        ("products (GFLOP/s)", rates),
        ("dtype auto", machine.auto),
        ("memory bandwidth", f"{machine.bandwidth / 1e9:,.0f} GB/s"),
        *machine.packages.items(),
        ("ONNX Runtime on", ", ".join(machine.providers) or "not installed"),
        ("disk", f"{disk.free_bytes / GIB:.0f} GiB free in {disk.directory}"),
        ("disk speed", f"writes {disk.write / 1e6:,.0f}, reads {disk.read / 1e6:,.0f} MB/s"),
    ]


def _describe_gpu(gpu: Gpu) -> str:
    memory = "" if gpu.memory_bytes is None else f", {gpu.memory_bytes / GIB:.0f} GiB"
    capability = "" if gpu.capability is None else f", capability {gpu.capability}"
    return f"{gpu.name}{memory}{capability}{'' if gpu.visible else ', not visible'}"


def _as_version(capability: tuple[int, int] | None) -> str | None:
    return None if capability is None else ".".join(map(str, capability))
