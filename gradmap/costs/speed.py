"""How fast this machine runs a model: one decoder layer of the model's own shape, with random
weights, is timed.

A model reaches a part of what its products reach alone, on every machine another one. The memory is
timed by a copy, for a single stream's tokens follow the weights that are read.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from gradmap.common.machine import Rates, available_bytes, measure_cpu, warn_if_threads_hinder
from gradmap.costs.steps import WRITTEN_TOGETHER, Hardware
from gradmap.model.batching import forward_batch, logits_batch
from gradmap.model.configs import layer_count, prune_config
from gradmap.model.layerwise import sample_losses
from gradmap.model.model_sizes import context_length
from gradmap.model.precision import (
    AUTOCAST,
    DTYPES,
    computing_in,
    prepare_for_autocast,
    weights_dtype,
)
from gradmap.model.shape import Shape
from gradmap.model.sublayers import Pair

TOKENS = 128
# A layer is timed if, by the speed of products alone, a pass takes no longer, and if its weights
# take no more than this share of the free memory. Passes are repeated for so long, and at most so
# many times.
PASS_LIMIT_S, TIMING_LIMIT_S, REPETITIONS = 0.3, 1.0, 20
MEMORY_SHARE = 0.2
# Where a layer is not timed: what it reaches of the FLOP/s of a product (SmolLM2's on an EPYC: 0.7
# in bfloat16, 0.9 in float32), and what is left of that where tokens of 64 samples pass one at a
# time (0.35 to 0.5, docs/scaling.md).
LAYER_SHARE, SINGLE_TOKEN_SHARE = 0.8, 0.4
# Of the layer's model, which has no head.
VOCABULARY = 256
COPIED_BYTES = 1 << 27
GPU_PRODUCT_SIZE = 4096
DISK_CHUNK_BYTES, DISK_LIMIT_S, MOST_WRITTEN_BYTES = 1 << 22, 0.5, 1 << 28


@dataclass(frozen=True)
class Disk:
    """The disk of the cache directory. write, read: bytes per second."""

    directory: str
    free_bytes: int
    write: float
    read: float


def measure_hardware(config: Mapping[str, Any], dtype: str, device: str) -> Hardware:
    """How fast this machine runs a model with this config (of
    gradmap.model.checkpoint.read_config); measured in a second or two.

    dtype: a name of gradmap.model.precision. device: cpu or cuda:N; of several GPUs, one.
    """
    if device.startswith("cpu"):
        warn_if_threads_hinder()
    shape = Shape.of_config(config)
    rate = flops_per_s(product_rates(device), dtype)
    room = memory_bytes(device)
    hardware = Hardware(
        name=device,
        flops=rate,
        bandwidth=memory_bandwidth(device),
        memory=room,
        efficiency=LAYER_SHARE,
        single_token_share=SINGLE_TOKEN_SHARE,
        weight_bytes=product_dtype(dtype).itemsize,
        state_bytes=weights_dtype(dtype).itemsize,
    )
    if _can_be_timed(shape, dtype, PASS_LIMIT_S * rate, MEMORY_SHARE * room):
        return time_model(config, dtype, hardware)
    return hardware


def product_dtype(dtype: str) -> torch.dtype:
    """The dtype that weights are multiplied in."""
    return torch.bfloat16 if dtype == AUTOCAST else DTYPES[dtype]


def flops_per_s(rates: Rates, dtype: str) -> float:
    """FLOP/s of products; float64 is taken to be half as fast as float32."""
    if dtype == "float64":
        return flops_per_s(rates, "float32") / 2
    return 1e9 * rates.by_dtype["bfloat16" if dtype == AUTOCAST else dtype]


def product_rates(device: str) -> Rates:
    """GFLOP/s of matrix products by dtype."""
    return measure_cpu() if device.startswith("cpu") else _measure_gpu(device)


def memory_bytes(device: str) -> int:
    """Bytes of memory that are free on a device."""
    return available_bytes() if device.startswith("cpu") else torch.cuda.mem_get_info(device)[0]


def memory_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (seconds,) = _best_s(device, lambda: target.copy_(source))
    return 2 * COPIED_BYTES / seconds


def measure_disk(directory: Path) -> Disk:
    """Writes a file that has no name, chunk by chunk, and reads it back, for half a second each."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    chunk = os.urandom(DISK_CHUNK_BYTES)
    with TemporaryFile(dir=existing, buffering=0) as file:
        written, write_s = 0, 0.0
        while write_s < DISK_LIMIT_S and written < MOST_WRITTEN_BYTES:
            started = time.perf_counter()
            written += file.write(chunk)
            os.fsync(file.fileno())
            write_s += time.perf_counter() - started
        # Else it would be read from memory.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        read, started = 0, time.perf_counter()
        while time.perf_counter() - started < DISK_LIMIT_S:
            part = file.read(DISK_CHUNK_BYTES)
            if not part:
                break
            read += len(part)
        read_s = time.perf_counter() - started
    return Disk(str(directory), shutil.disk_usage(existing).free, written / write_s, read / read_s)


@torch.inference_mode()
def time_model(config: Mapping[str, Any], dtype: str, hardware: Hardware) -> Hardware:
    """The hardware with what was timed: one layer, in passes of a few samples and of a single token
    of WRITTEN_TOGETHER samples, and the head with the loss behind it."""
    device = hardware.name
    model, layer = _one_layer(config, dtype, device)
    positions = context_length(model.config.to_dict()) or TOKENS
    sample = torch.zeros(1, min(TOKENS, positions), dtype=torch.int64, device=device)
    ids = sample.expand(forward_batch(sample, sample.device), -1)
    behind = torch.zeros(
        WRITTEN_TOGETHER, max(1, ids.numel() // WRITTEN_TOGETHER), dtype=torch.int64, device=device
    )
    shape = Shape.of_config(config)
    head = torch.full(
        (shape.vocabulary, shape.width), 0.01, dtype=product_dtype(dtype), device=device
    )
    samples = sample.expand(
        min(len(ids), logits_batch(sample.shape[1], shape.vocabulary, sample.device)), -1
    )
    hidden = head.new_full((*samples.shape, shape.width), 0.01)
    with computing_in(dtype, model):
        cache = model.base_model(input_ids=behind, use_cache=True).past_key_values
        bulk_s, single_s, head_s = _best_s(
            device,
            lambda: model.base_model(input_ids=ids, use_cache=False),
            lambda: model.base_model(
                input_ids=behind[:, :1], past_key_values=cache, use_cache=True
            ),
            lambda: sample_losses(torch.nn.functional.linear(hidden, head), samples),
        )
    flops = layer.layer_flops(1) * ids.numel() / bulk_s
    single_flops = layer.layer_flops(1) * WRITTEN_TOGETHER / single_s
    head_flops = shape.head_flops * samples.numel() / head_s
    return replace(
        hardware,
        flops=flops,
        efficiency=1.0,
        single_token_share=single_flops / flops,
        head_cost=max(1.0, flops / head_flops),
    )


def _can_be_timed(shape: Shape, dtype: str, most_flops: float, most_bytes: float) -> bool:
    """Whether a layer and the head can be timed: what a pass multiplies and what the weights take
    is within the limits."""
    samples = forward_batch(torch.empty(1, TOKENS), torch.device("cpu"))
    layer_flops = shape.layer_flops(1) * TOKENS * samples
    flops = max(layer_flops, TOKENS * shape.head_flops)
    stored = weights_dtype(dtype).itemsize + product_dtype(dtype).itemsize
    return (
        flops <= most_flops
        and stored * (shape.layer_parameters + shape.head_parameters) <= most_bytes
    )


def _one_layer(config: Mapping[str, Any], dtype: str, device: str) -> tuple[Any, Shape]:
    """The model with its first layer alone and a small vocabulary; every weight is the same."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    all_but_first = [Pair.of_layer(layer) for layer in range(1, layer_count(dict(config)))]
    small = prune_config(dict(config), all_but_first) | tokens | {"vocab_size": VOCABULARY}
    parsed = CONFIG_MAPPING[config["model_type"]](**small)
    # Else weights would be drawn, which takes longer than to use them.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parsed, dtype=weights_dtype(dtype))
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(0.01)
    if dtype == AUTOCAST:
        prepare_for_autocast(model)
    return model, Shape.of_config(parsed.to_dict())


def _measure_gpu(device: str) -> Rates:
    rates = {}
    for name in ("float32", "bfloat16", "float16"):
        ones = torch.ones(GPU_PRODUCT_SIZE, GPU_PRODUCT_SIZE, dtype=DTYPES[name], device=device)
        (seconds,) = _best_s(device, partial(torch.matmul, ones, ones))
        rates[name] = 2 * GPU_PRODUCT_SIZE**3 / seconds / 1e9
    return Rates(rates)


def _best_s(device: str, *runs: Callable[[], object]) -> list[float]:
    """The least of a few counts of each, after one that does not count; in turn, so that who else
    is busy meets all."""
    best_s = [math.inf] * len(runs)
    for run in runs:
        _seconds_of(run, device)
    until = time.perf_counter() + TIMING_LIMIT_S
    for repetition in range(REPETITIONS):
        if repetition == 0 or time.perf_counter() < until:
            best_s = [
                min(best, _seconds_of(run, device)) for best, run in zip(best_s, runs, strict=True)
            ]
    return best_s


def _seconds_of(run: Callable[[], object], device: str) -> float:
    _wait_for(device)
    started = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: str) -> None:
    if not device.startswith("cpu"):
        torch.cuda.synchronize(device)
