"""How many samples go through a model at once: as many as a fixed share of memory allows, measured, not guessed."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradmap.console import say
from gradmap.errors import UserError

# What the activations of a batch may take. More brings no speed: on a CPU, small batches stay in its caches.
ACTIVATION_BYTES = {"cpu": 3 << 27, "cuda": 3 << 30}
TOKENS = {"cpu": 1024, "cuda": 8192}
FORWARD_BATCH = 4  # samples in a pass that keeps nothing for a backward one


def measured_batch_size(run_one: Callable[[], object], model: nn.Module, tokens: int, device: torch.device) -> int:
    """Returns how many samples of `tokens` tokens to take at once. run_one: runs a single one forward and backward.

    Counted is what autograd keeps for the backward pass, which is the same on every machine.
    """
    kept = _bytes_kept_for_backward(run_one, model)
    return max(1, min(ACTIVATION_BYTES[device.type] // max(1, kept), TOKENS[device.type] // tokens))


def _bytes_kept_for_backward(run: Callable[[], object], model: nn.Module) -> int:
    """Without the weights, which are there in any case, and which many tensors are views of."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    return sum(size for address, size in sizes.items() if address not in weights)


class Batches:
    """Hands out samples in batches of `size`, which is halved, for good, whenever memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, samples: int, run_batch: Callable[[slice], None]) -> None:
        """Calls `run_batch` for all of `samples` in turn; a batch that did not fit is started again, in halves.

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
            raise UserError("One sample does not fit into memory; use --stream, fewer --tokens, or --dtype bfloat16.")
        self.size //= 2
        say(f"Memory ran out; going on with {self.size} samples at once")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
