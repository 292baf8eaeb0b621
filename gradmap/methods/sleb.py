"""SLEB (Song et al. 2024, arXiv 2402.09025): the loss of the model without a layer, tried for every
layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmap.common.distributed import share_of, summed
from gradmap.methods.selection import Advance, Selection, Subject
from gradmap.model.architectures import Architecture, without_layers
from gradmap.model.batching import forward_batch
from gradmap.model.layerwise import losses_from, record_layer_calls


class RemovalLossScorer:
    """Loss without each layer but the first and the last of the model, which SLEB keeps, in nats
    per token."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def work(self, alive: int) -> int:
        return len(share_of(self._subject.calibration.input_ids)[0]) * alive

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        removed = so_far.removal_order
        model, architecture = self._subject.model, self._subject.architecture
        alive = self._subject.alive(removed)
        ends = (self._subject.layers[0], self._subject.layers[-1])
        places = [place for place, layer in enumerate(alive) if layer not in ends]
        with without_layers(model, architecture, removed):
            losses = losses_without(
                model, architecture, self._subject.calibration.input_ids, places, advance
            )
        return dict(zip([alive[place] for place in places], losses.tolist(), strict=True))


@torch.no_grad()
def losses_without(
    model: Any,
    architecture: Architecture,
    input_ids: Tensor,
    places: Sequence[int],
    advance: Advance = lambda n: None,
) -> Tensor:
    """Mean next-token cross-entropy without the layer at each of `places`: (P,) float64. input_ids:
    (N, T).

    What enters a layer is the same whichever later one is left out, so only the layers behind it
    run again.
    """
    layers = list(architecture.layer_list(model))
    totals = torch.zeros(len(places), dtype=torch.float64)
    for batch in share_of(input_ids)[0].split(forward_batch(input_ids, model.device)):
        batch = batch.to(model.device)
        hidden, calls = record_layer_calls(model, layers, batch)
        for place, (layer, call) in enumerate(zip(layers, calls, strict=True)):
            if place in places:
                without = hidden
                for later, later_call in zip(layers[place + 1 :], calls[place + 1 :], strict=True):
                    without = later_call.run(later, without)
                totals[places.index(place)] += (
                    losses_from(model, layers, without, batch).double().sum().cpu()
                )
            hidden = call.run(layer, hidden)
        advance(len(layers) * len(batch))
    return summed(totals) / (input_ids.shape[0] * (input_ids.shape[1] - 1))


def losses_without_reference(
    model: Any, architecture: Architecture, input_ids: Tensor, places: Sequence[int]
) -> list[float]:
    """The same by running each smaller model as a whole."""
    losses = []
    for place in places:
        with without_layers(model, architecture, [place]), torch.no_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.flatten(end_dim=1), input_ids[:, 1:].flatten()
            ).item()
        )
    return losses
