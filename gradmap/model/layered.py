"""A causal language model as layers that can be left out, changed, and run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradmap.common.distributed import share_of, summed
from gradmap.model.architectures import Architecture, architecture_of, prune_config
from gradmap.model.batching import forward_batch
from gradmap.model.corrections import Changes, Place, correcting_hook

# Told of passes, forward or backward, of one sample through one layer.
Advance = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class LayeredModel:
    """A `...ForCausalLM` of transformers and the names of its family.

    network: the model itself. Everything here leaves it as it was when a block ends.
    """

    network: Any
    architecture: Architecture

    @classmethod
    def of(cls, network: Any) -> LayeredModel:
        """Raises UserError if the family is unknown or unsafe to prune."""
        return cls(network, architecture_of(network.config.to_dict()))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers that it has now."""
        return self.architecture.layer_list(self.network)

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.network.device
        return device

    def down_projection(self, layer: int) -> nn.Module:
        return self.architecture.down_projection_of(self.layers[layer])

    def linear_maps(self, layers: Sequence[int]) -> Iterator[tuple[Place, nn.Module]]:
        """Every linear map of the layers at these indices; not the stacked weights of experts, nor
        their router."""
        for index in layers:
            for path, module in self.layers[index].named_modules():
                if isinstance(module, nn.Linear | Conv1D):
                    yield Place(index, path), module

    @contextmanager
    def without(self, removed: Sequence[int]) -> Iterator[None]:
        """Runs without the layers at the `removed` indices.

        The layer list, every module's `layer_idx` (its KV cache slot) and the config's per-layer
        fields follow.
        """
        original, original_config = self.layers, self.config.to_dict()
        pruned_config = prune_config(original_config, removed)
        changed = [key for key, value in pruned_config.items() if value != original_config[key]]
        gone = set(removed)
        kept = nn.ModuleList(layer for index, layer in enumerate(original) if index not in gone)
        try:
            _number_layers(kept)
            self._configure({key: pruned_config[key] for key in changed})
            with self.architecture.layers_replaced(self.network, kept):
                yield
        finally:
            _number_layers(original)
            self._configure({key: original_config[key] for key in changed})

    @contextmanager
    def changed(self, changes: Changes, without: Sequence[int] = ()) -> Iterator[None]:
        """Runs with changes on hooks, and without some layers. Places are indices in all layers."""
        layers = self.layers
        with ExitStack() as stack:
            for place, of_place in changes.items():
                module = layers[place.layer].get_submodule(place.target)
                stack.callback(module.register_forward_hook(correcting_hook(of_place)).remove)
            if without:
                stack.enter_context(self.without(without))
            yield

    def batches(
        self, input_ids: Tensor, advance: Advance = lambda n: None, size: int | None = None
    ) -> Iterator[Tensor]:
        """This process's share of the samples (N, T), some at a time, on the model's device: (B,
        T).

        size: B; if not given, as many as a pass takes that keeps nothing for a backward one.
        advance: told of a batch's passes through all layers when the next one is asked for.
        """
        size = size or forward_batch(input_ids, self.device)
        for batch in share_of(input_ids)[0].split(size):
            yield batch.to(self.device)
            advance(len(self.layers) * len(batch))

    def total(
        self,
        input_ids: Tensor,
        of_batch: Callable[[Tensor], Tensor],
        advance: Advance = lambda n: None,
        size: int | None = None,
    ) -> Tensor:
        """The sum, over all samples (N, T) and all processes, of what a batch (B, T) gives: (...)
        float64 in the CPU's memory."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.batches(input_ids, advance, size):
            total = total + of_batch(batch).double().cpu()
        return summed(total)

    def _configure(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            setattr(self.config, key, value)


def _number_layers(layers: nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
