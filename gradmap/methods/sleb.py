"""SLEB (Song et al. 2024, arXiv 2402.09025): the loss of the model without a layer, tried for every
layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmap.common.distributed import share_of
from gradmap.costs.steps import sleb_flops
from gradmap.costs.timing import in_rounds
from gradmap.methods.base import Selector
from gradmap.methods.selection import Selection, Subject
from gradmap.model.layered import Advance, LayeredModel
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
        model, ids = self._subject.model, self._subject.calibration.input_ids
        alive = self._subject.alive(removed)
        ends = (self._subject.layers[0], self._subject.layers[-1])
        places = [place for place, layer in enumerate(alive) if layer not in ends]
        with model.without(removed):
            losses = losses_without(model, ids, places, advance)
        return dict(zip([alive[place] for place in places], losses.tolist(), strict=True))


@torch.no_grad()
def losses_without(
    model: LayeredModel,
    input_ids: Tensor,
    places: Sequence[int],
    advance: Advance = lambda n: None,
) -> Tensor:
    """Mean next-token cross-entropy without the layer at each of `places`: (P,) float64. input_ids:
    (N, T).

    What enters a layer is the same whichever later one is left out, so only the layers behind it
    run again.
    """

    def of_batch(batch: Tensor) -> Tensor:
        losses = torch.zeros(len(places), dtype=torch.float64)
        hidden, calls = record_layer_calls(model, batch)
        passes = list(zip(model.layers, calls, strict=True))
        for place, (layer, call) in enumerate(passes):
            if place in places:
                without = hidden
                for later, later_call in passes[place + 1 :]:
                    without = later_call.run(later, without)
                losses[places.index(place)] = losses_from(model, without, batch).double().sum()
            hidden = call.run(layer, hidden)
        return losses

    predictions = input_ids.shape[0] * (input_ids.shape[1] - 1)
    return model.total(input_ids, of_batch, advance) / predictions


def losses_without_reference(
    model: LayeredModel, input_ids: Tensor, places: Sequence[int]
) -> list[float]:
    """`losses_without` by running each smaller model as a whole. input_ids: (N, T)."""
    losses = []
    for place in places:
        with model.without([place]), torch.no_grad():
            logits = model.network(input_ids=input_ids, use_cache=False).logits[:, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.flatten(end_dim=1), input_ids[:, 1:].flatten()
            ).item()
        )
    return losses


SELECTOR = Selector(
    name="sleb",
    about="the layer without which the loss is lowest; the first and the last stay",
    paper="SLEB (arXiv 2402.09025)",
    make=RemovalLossScorer,
    score_label="loss without the layer (nats per token)",
    round_takes="for every layer, a pass through those behind it",
    seconds=in_rounds(sleb_flops),
)
