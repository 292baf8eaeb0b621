"""SLEB (Song et al. 2024, arXiv 2402.09025): the loss of the model without a layer, tried for every
layer, or pair of sublayers."""

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
from gradmap.model.layerwise import losses_from, record_pieces
from gradmap.model.sublayers import PIECES, Pair, Unit


class RemovalLossScorer:
    """Loss without each candidate, in nats per token. The first and the last layer of the model
    stay, as in SLEB."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def work(self, alive: int) -> int:
        return len(share_of(self._subject.calibration.input_ids)[0]) * alive

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        removed, subject = so_far.removal_order, self._subject
        ends = (subject.layers[0], subject.layers[-1])
        tried = {
            place: pair
            for place, pair in enumerate(subject.candidates(removed))
            if not pair.is_in(ends)
        }
        ids = subject.calibration.input_ids
        with subject.model.without(removed):
            losses = losses_without(subject.model, ids, list(tried), subject.unit, advance)
        return dict(zip(tried.values(), losses.tolist(), strict=True))


@torch.no_grad()
def losses_without(
    model: LayeredModel,
    input_ids: Tensor,
    places: Sequence[int],
    unit: Unit = "layer",
    advance: Advance = lambda n: None,
) -> Tensor:
    """Mean next-token cross-entropy without the unit that begins at each of `places`, counted in
    pieces: (P,) float64. input_ids: (N, T).

    What enters a piece is the same whichever later one is left out, so only those behind it run
    again.
    """

    def of_batch(batch: Tensor) -> Tensor:
        losses = torch.zeros(len(places), dtype=torch.float64)
        hidden, pieces = record_pieces(model, batch, unit)
        for place, piece in enumerate(pieces):
            if place in places:
                without = hidden
                for later in pieces[place + PIECES[unit] :]:
                    without = later.run(without)
                losses[places.index(place)] = losses_from(model, without, batch).double().sum()
            hidden = piece.run(hidden)
        return losses

    predictions = input_ids.shape[0] * (input_ids.shape[1] - 1)
    return model.total(input_ids, of_batch, advance) / predictions


def losses_without_reference(
    model: LayeredModel, input_ids: Tensor, removed: Sequence[Pair]
) -> list[float]:
    """`losses_without` each of these, by running each smaller model as a whole. input_ids:
    (N, T)."""
    losses = []
    for pair in removed:
        with model.without([pair]), torch.no_grad():
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
    seconds=in_rounds(sleb_flops, of_each=True),
)
