"""What vLLM reads from the environment."""

from __future__ import annotations

from functools import cache
from importlib.metadata import packages_distributions

KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def vllm_defaults() -> dict[str, str]:
    """Environment variables for vLLM where the user set none: nothing is fetched, nothing is reported, and GPUs are
    numbered as NVML does, which vLLM asks about them by number."""
    defaults = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if is_cpu_build():
        defaults[KV_CACHE_VARIABLE] = "2"  # GiB
    return defaults


@cache  # reads the metadata of every package
def is_cpu_build() -> bool:
    return "vllm-cpu" in packages_distributions().get("vllm", ())
