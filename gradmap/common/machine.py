"""What this machine can do: its cores, its memory, and how fast it multiplies. Found by looking and
by measuring."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from gradmap.common.console import say

CGROUP = Path("/sys/fs/cgroup")
# A product as small models have it: tokens x inputs x outputs.
PRODUCT_SHAPE = (256, 576, 1536)
# The best of so many counts: others may use the machine meanwhile.
REPETITIONS = 5
PRODUCTS_IN_TURN = 20
# A dtype pays if its products are faster by this factor. Native ones are 2 to 8 times as fast,
# emulated ones slower.
WORTHWHILE = 1.2
NATIVE_BFLOAT16_CAPABILITY = (8, 0)
THREADS_VARIABLE = "OMP_NUM_THREADS"


def available_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that can be had: the machine's, or what is left of a container's limit if that is
    less. Pages of files that were read, which the kernel gives back when others need room, do not
    count as used."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = (
            (cgroup / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
    except OSError:
        return available
    return (
        available
        if limit == "max"
        else min(available, int(limit) - int(used) + _reclaimable_bytes(cgroup))
    )


def _reclaimable_bytes(cgroup: Path) -> int:
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    held = dict(line.split() for line in lines)
    return sum(int(held.get(kind, 0)) for kind in ("active_file", "inactive_file"))


def allowed_cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may keep busy: those it may run on, or a container's quota if that is
    less."""
    cores = len(allowed_cores())
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def limit_threads() -> None:
    """Keeps torch within a container's quota: more threads than it may run at a time wait for each
    other.

    OMP_NUM_THREADS, if the user set it, is obeyed.
    """
    if THREADS_VARIABLE not in os.environ and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())


@dataclass(frozen=True)
class Rates:
    """GFLOP/s of matrix products on this machine's cores, by dtype."""

    by_dtype: Mapping[str, float]

    def ratio(self, dtype: str) -> float:
        """How many times as fast as float32 a dtype is."""
        return self.by_dtype[dtype] / self.by_dtype["float32"]

    def describe(self) -> str:
        return (
            ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in self.by_dtype.items()) + " GFLOP/s"
        )


@cache
def measure_cpu() -> Rates:
    """The rates of this machine's cores. Takes some 0.1 s where everything is native, and below 1 s
    elsewhere."""
    limit_threads()
    best_s = dict.fromkeys(("float32", "bfloat16", "float16"), math.inf)
    products = {name: _product(getattr(torch, name)) for name in best_s}
    # In turn, so that who else is busy meets all alike.
    for _ in range(REPETITIONS):
        for name, (inputs, weight) in products.items():
            best_s[name] = min(best_s[name], _seconds_of_product(inputs, weight))
    flops = 2 * math.prod(PRODUCT_SHAPE)
    return Rates({name: flops / seconds / 1e9 for name, seconds in best_s.items()})


def bfloat16_pays(device: str = "cpu") -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32: AMX, AVX512-BF16 and the like;
    GPUs of 8.0 on."""
    if device.startswith("cpu"):
        return measure_cpu().ratio("bfloat16") >= WORTHWHILE
    count = torch.cuda.device_count()
    capabilities = [torch.cuda.get_device_capability(index) for index in range(count)]
    return min(capabilities) >= NATIVE_BFLOAT16_CAPABILITY


@cache
def multiplies_int8_exactly() -> bool:
    """Whether sums of 8-bit products come out right on this CPU. Without VNNI, oneDNN adds pairs of
    them in 16 bits, which is too few for large values, and says nothing."""
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    products = torch._int_mm(largest, largest.mT.contiguous())
    return bool((products == 127 * 127 * largest.shape[1]).all())


@cache
def warn_if_threads_hinder() -> None:
    """Says so if several threads compute more slowly than one would: others use the machine."""
    limit_threads()
    threads = torch.get_num_threads()
    if threads == 1:
        return
    inputs, weight = _product(torch.float32)
    together_s, alone_s = 0.0, 0.0
    # All of them count: what one thread waits for another is not in the best.
    for _ in range(PRODUCTS_IN_TURN):
        together_s += _seconds_of_product(inputs, weight)
        with _threads(1):
            alone_s += _seconds_of_product(inputs, weight)
    if together_s > alone_s:
        say(
            f"Warning: this machine is busy, and {threads} threads take {together_s / alone_s:.1f} "
            f"times as long as one; set {THREADS_VARIABLE}=1 until it is free"
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _product(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tokens, d_in, d_out = PRODUCT_SHAPE
    inputs, weight = torch.ones(tokens, d_in, dtype=dtype), torch.ones(d_out, d_in, dtype=dtype)
    # The first product also looks for a kernel.
    torch.nn.functional.linear(inputs, weight)
    return inputs, weight


def _seconds_of_product(inputs: Tensor, weight: Tensor) -> float:
    started = time.perf_counter()
    torch.nn.functional.linear(inputs, weight)
    return time.perf_counter() - started
