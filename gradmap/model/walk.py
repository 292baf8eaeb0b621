"""Samples on their way through the layers of a model: whoever works from front to back need not
begin again.

A layer that is looked at runs once more when it is passed, and a loss runs what is ahead without
passing it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gradmap.common.distributed import share_of, summed
from gradmap.model.batching import Batches
from gradmap.model.corrections import Changes
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import capturing, divergences_from, record_layer_calls

# What enters and leaves each watched module, (B, T, ...), and what leaves the layer, (B, T, d); of
# which samples.
Look = Callable[[slice, list[tuple[Tensor, Tensor]], Tensor], None]


class Walk:
    """This process's share of some samples, in front of one of a model's layers.

    hidden: what enters it, (n, T, d), on the model's device. input_ids: (n, T), likewise.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LayeredModel,
        layers: Sequence[int],
        input_ids: Tensor,
        batches: Batches,
    ) -> None:
        """layers: the indices of those to walk through. input_ids: (N, T)."""
        self._model, self._batches = model, batches
        self._all_layers = list(model.layers)
        self._ahead = list(layers)
        self._tokens = input_ids.numel()  # of all processes
        self.input_ids = share_of(input_ids)[0].to(model.device)
        _, self._calls = record_layer_calls(model, self.input_ids[:1])  # the same for every sample
        self.hidden = self._gathered(self._embed)

    def go_to(self, layer: int, changes: Changes) -> None:
        """On to the entrance of `layer`, through those before it that are ahead, with the
        changes."""
        passed = [index for index in self._ahead if index < layer]
        if passed:
            self.hidden = self._leaving(passed, changes)
            self._ahead = self._ahead[len(passed) :]

    def finish(self, changes: Changes) -> Tensor:
        """Through all that are ahead: what leaves the last layer, (n, T, d)."""
        self.go_to(len(self._all_layers), changes)
        return self.hidden

    @torch.no_grad()
    def look(self, layer: int, modules: Sequence[nn.Module], changes: Changes, visit: Look) -> None:
        """Runs the layer, which is the next one, batch after batch without passing it; `visit` sees
        what its modules do."""
        assert self._ahead[0] == layer

        def run_batch(samples: slice) -> None:
            with capturing(modules) as captured:
                leaving = self._run([layer], samples)
            visit(samples, [captured[module] for module in modules], leaving)

        with self._model.changed(changes):
            self._batches.run(len(self.hidden), run_batch)

    @torch.no_grad()
    def divergence(self, wanted: Tensor, changes: Changes) -> float:
        """Mean divergence of the next-token distributions (nats per token) from those that follow
        from `wanted`, the dense model's last output (n, T, d), if the rest of the way is gone with
        the changes."""
        divergences = torch.zeros(len(self.hidden), dtype=torch.float64, device=self.hidden.device)

        def run_batch(samples: slice) -> None:
            leaving = self._run(self._ahead, samples)
            of_batch = divergences_from(
                self._model, leaving, wanted[samples], self.input_ids[samples]
            )
            divergences[samples] = of_batch.double().to(divergences.device)

        with self._model.changed(changes):
            self._batches.run(len(self.hidden), run_batch)
        return summed(divergences.sum().cpu()).item() / self._tokens

    @torch.no_grad()
    def _leaving(self, layers: Sequence[int], changes: Changes) -> Tensor:
        with self._model.changed(changes):
            return self._gathered(lambda samples: self._run(layers, samples))

    def _run(self, layers: Sequence[int], samples: slice) -> Tensor:
        hidden = self.hidden[samples]
        for index in layers:
            hidden = self._calls[index].run(self._all_layers[index], hidden)
        return hidden

    def _embed(self, samples: slice) -> Tensor:
        return record_layer_calls(self._model, self.input_ids[samples])[0]

    def _gathered(self, compute: Callable[[slice], Tensor]) -> Tensor:
        """What `compute` gives of all samples, (n, T, d), in batches."""
        parts: list[Tensor] = []
        self._batches.run(len(self.input_ids), lambda samples: parts.append(compute(samples)))
        return torch.cat(parts)
