"""How many samples go through a model at once: as many as a fixed share of memory allows, measured,
not guessed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook

from gradmap.common.console import say
from gradmap.common.errors import UserError
from gradmap.common.failures import is_out_of_memory

# What the activations of a batch may take. On a CPU, more brings no speed: small batches stay in
# its caches. A GPU waits for Python where batches are small, so there it is a share of what is
# free.
CPU_ACTIVATION_BYTES = 3 << 27
GPU_ACTIVATION_SHARE = 0.25
GPU_STATES_SHARE = 0.5
TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits in float32, made at once for a loss and its gradient.
LOGITS_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
# Samples in a pass that keeps nothing for a backward one; on a GPU, short samples are more.
FORWARD_BATCH = 4
GPU_FORWARD_TOKENS = 2048


def forward_batch(input_ids: Tensor, device: torch.device) -> int:
    """How many samples of input_ids (N, T) go at once through a pass that keeps nothing for a
    backward one."""
    return (
        max(FORWARD_BATCH, GPU_FORWARD_TOKENS // input_ids.shape[1])
        if device.type == "cuda"
        else FORWARD_BATCH
    )


def home_for(model: Any, states: int) -> torch.device:
    """Where so many hidden states (d,) are kept: with the model if they fit beside it, else in the
    CPU's memory."""
    device: torch.device = model.device
    if device.type != "cuda":
        return device
    needed = states * model.config.hidden_size * model.get_input_embeddings().weight.element_size()
    return (
        device
        if needed <= GPU_STATES_SHARE * torch.cuda.mem_get_info(device)[0]
        else torch.device("cpu")
    )


def states_batch(bytes_of_one: int, device: torch.device) -> int:
    """How many samples, whose states take so much each, have room on a GPU at once."""
    return max(1, int(GPU_STATES_SHARE * torch.cuda.mem_get_info(device)[0]) // bytes_of_one)


def moved_home(tensor: Tensor, home: torch.device) -> Tensor:
    """The tensor, (...), at home. From a GPU into memory that it reaches by itself, so that nothing
    waits for the copy; something has to before the CPU reads it."""
    if tensor.device.type == home.type:
        return tensor
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, device=home, pin_memory=True)
    return kept.copy_(tensor, non_blocking=True)


def logits_batch(tokens: int, vocabulary: int, device: torch.device) -> int:
    """How many samples of `tokens` tokens go at once through the output layer, whose logits are the
    largest tensor."""
    return max(1, LOGITS_BYTES[device.type] // (4 * tokens * vocabulary))


def logits_parts(
    samples: int, tokens: int, vocabulary: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Samples and positions that go at once through the output layer: whole samples or, where the
    logits of one are too large, a part of its positions."""
    positions = min(tokens, logits_batch(1, vocabulary, device))
    together = logits_batch(positions, vocabulary, device)
    for first, start in product(range(0, samples, together), range(0, tokens, positions)):
        yield slice(first, first + together), slice(start, start + positions)


def measured_batch_size(run_one: Callable[[], object], tokens: int, device: torch.device) -> int:
    """Returns how many samples of `tokens` tokens to take at once. run_one: runs a single one
    forward and backward.

    Counted is what autograd keeps for the backward pass, which is the same on every machine.
    """
    return batch_of(bytes_kept_for_backward(run_one), tokens, device)


def batch_of(kept: int, tokens: int, device: torch.device) -> int:
    """How many samples of `tokens` tokens to take at once, if autograd keeps so many bytes for
    one."""
    return max(1, min(activation_bytes(device) // max(1, kept), TOKENS[device.type] // tokens))


def activation_bytes(device: torch.device) -> int:
    """What the activations of a batch may take."""
    if device.type == "cpu":
        return CPU_ACTIVATION_BYTES
    return int(GPU_ACTIVATION_SHARE * torch.cuda.mem_get_info(device)[0])


def bytes_kept_for_backward(run: Callable[[], object]) -> int:
    """What autograd keeps of a run of modules, without their weights: these are there in any case,
    and many tensors are views of them."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def forget_weights(module: nn.Module, args: object, output: object) -> None:
        """As soon as it has run: of weights that processes share, all is there only meanwhile."""
        for weight in (*module.parameters(), *module.buffers()):
            if not isinstance(weight, DTensor):
                sizes.pop(weight.untyped_storage().data_ptr(), None)

    hook = register_module_forward_hook(forget_weights)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
    finally:
        hook.remove()
    return sum(sizes.values())


class Batches:
    """Hands out samples in batches of `size`, which is halved, for good, whenever memory runs
    out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, samples: int, run_batch: Callable[[slice], None]) -> None:
        """Calls `run_batch` for all of `samples` in turn; a batch that did not fit is started
        again, in halves.

        Raises UserError if a single sample does not fit.
        """
        start = 0
        while start < samples:
            batch = slice(start, min(start + self.size, samples))
            try:
                run_batch(batch)
                start = batch.stop
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve()

    def _halve(self) -> None:
        if self.size == 1:
            raise UserError(
                "One sample does not fit into memory; use --stream, fewer --tokens, or --dtype "
                "bfloat16."
            )
        self.size //= 2
        say(f"Memory ran out; going on with {self.size} samples at once")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
