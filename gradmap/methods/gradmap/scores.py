"""Stage 1: the importance of a layer is the size of its loss gradient (GradMAP, Eq. 5-7).

    s_i = 1/N sum_j sum_{theta in layer i} || dL(x_j)/d theta ||_2

One norm per parameter tensor and per sample; L is the sum over the T-1 next-token terms of one
sample. A pair of sublayers has the sum over the tensors of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradmap.common.distributed import share_of, summed
from gradmap.common.finite import require_finite_losses
from gradmap.costs.steps import score_flops
from gradmap.costs.timing import in_rounds
from gradmap.methods.base import Selector
from gradmap.methods.gradmap.ghost_norms import gradient_norms
from gradmap.methods.selection import Selection, Subject, scores_of_units
from gradmap.model.batching import Batches, logits_batch, measured_batch_size
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.layerwise import LayerCalls, losses_from, record_layer_calls, sample_losses
from gradmap.model.sublayers import PIECES, JoinedLayer, Pair, Unit, joined_layers


class GradientScorer:
    """Eq. 7. Streamed, hidden states that enter layers before the first removed one are kept
    between rounds."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._input_ids = subject.calibration.input_ids
        self._batches = fitting_batches(subject.model, self._input_ids, subject.streamed)
        self._entering: list[Tensor] = []
        self._last_layers: list[JoinedLayer] = []

    def work(self, alive: int) -> int:
        return 2 * alive * len(share_of(self._input_ids)[0])

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        removed = so_far.removal_order
        layers = joined_layers(len(self._subject.layers), removed)
        self._forget_behind(layers)
        with self._subject.model.without(removed):
            scores = self._scores(advance)
        self._last_layers = layers
        return dict(zip(self._subject.candidates(removed), scores.tolist(), strict=True))

    def _forget_behind(self, layers: Sequence[JoinedLayer]) -> None:
        """What entered the first layer that is not as it was in the last round still does."""
        gone = [place for place, layer in enumerate(self._last_layers) if layer not in layers]
        del self._entering[gone[0] + 1 if gone else len(self._entering) :]

    def _scores(self, advance: Advance) -> Tensor:
        model, unit = self._subject.model, self._subject.unit
        if not self._subject.streamed:
            return gradient_scores(model, self._input_ids, self._batches, unit, advance)
        return streamed_gradient_scores(
            model, self._input_ids, self._batches, self._entering, unit, advance
        )


def gradient_scores(
    model: LayeredModel,
    input_ids: Tensor,
    batches: Batches,
    unit: Unit = "layer",
    advance: Advance = lambda n: None,
) -> Tensor:
    """Returns Eq. 7 for every candidate of the model as it is now: (C,) float64. input_ids: (N, T).

    Batched, and without forming parameter gradients where their norms follow from activations
    ("ghost norms"). Only activations carry gradients. advance: told of passes, forward or backward,
    of one sample through one layer. Raises UserError if the loss of a sample is not finite.
    """
    pieces = model.pieces(unit)
    share, first_sample = share_of(input_ids)
    totals = torch.zeros(len(pieces), dtype=torch.float64)

    def run_batch(batch: slice) -> None:
        _add_norms(model, share[batch], first_sample + batch.start, pieces, totals)
        advance(2 * len(share[batch]) * len(model.layers))

    batches.run(len(share), run_batch)
    return scores_of_units(summed(totals), unit) / len(input_ids)


def streamed_gradient_scores(
    model: LayeredModel,
    input_ids: Tensor,
    batches: Batches,
    entering: list[Tensor],
    unit: Unit = "layer",
    advance: Advance = lambda n: None,
) -> Tensor:
    """`gradient_scores`, one layer at a time for all samples: forward, then backward, with only the
    hidden states between layers kept. So it runs where a layer and (L + 1) x N x T x d hidden
    states fit, and computes every layer twice.

    entering: the hidden states (N, T, d) that enter the first layers, as far as they are known from
    the scores before; filled up here. Layers before the first removed one compute the same again,
    so those need not run forward.
    """
    layers = list(model.layers)
    share, first_sample = share_of(input_ids)
    calls = LayerCalls(model, share)
    if not entering:
        entering.append(record_layer_calls(model, share.to(model.device))[0].cpu())
    advance(len(share) * (len(entering) - 1))  # known from before
    for position in range(len(entering) - 1, len(layers)):
        leaving = torch.empty_like(entering[position])

        def run_forward(batch: slice, position: int = position, leaving: Tensor = leaving) -> None:
            hidden = entering[position][batch].to(model.device)
            call = calls.of(position, len(hidden))
            with torch.no_grad():
                leaving[batch] = call.run(layers[position], hidden)

        batches.run(len(leaving), run_forward)
        entering.append(leaving)
        advance(len(share))
    gradients = torch.empty_like(entering[-1])

    def start_backward(batch: slice) -> None:
        hidden, ids = entering[-1][batch].to(model.device), share[batch].to(model.device)
        gradients[batch] = loss_gradients(model, hidden, ids, first_sample + batch.start)

    batches.run(len(share), start_backward)
    pieces = model.pieces(unit)
    totals = torch.zeros(len(pieces), dtype=torch.float64)
    for position in reversed(range(len(layers))):
        of_layer = slice(PIECES[unit] * position, PIECES[unit] * (position + 1))

        def run_backward(
            batch: slice, position: int = position, of_layer: slice = of_layer
        ) -> None:
            leaf = entering[position][batch].to(model.device).requires_grad_(True)
            with gradient_norms(pieces[of_layer], len(leaf), totals[of_layer]):
                output = calls.of(position, len(leaf)).run(layers[position], leaf)
                output.backward(gradients[batch].to(output.device))
            assert leaf.grad is not None
            gradients[batch] = leaf.grad
            advance(len(leaf))

        batches.run(len(share), run_backward)
    return scores_of_units(summed(totals), unit) / len(input_ids)


def _add_norms(
    model: LayeredModel,
    input_ids: Tensor,
    first_sample: int,
    pieces: Sequence[nn.Module],
    totals: Tensor,
) -> None:
    """Adds the norms of one batch (B, T) to `totals` (P,), one for each of the pieces."""
    input_ids = input_ids.to(model.device)
    hidden, calls = record_layer_calls(model, input_ids)
    hidden.requires_grad_(True)
    with gradient_norms(pieces, len(input_ids), totals):
        for layer, call in zip(model.layers, calls, strict=True):
            hidden = call.run(layer, hidden)
        hidden.backward(loss_gradients(model, hidden.detach(), input_ids, first_sample))


def fitting_batches(model: LayeredModel, input_ids: Tensor, streamed: bool) -> Batches:
    """Measures on one sample of input_ids (N, T) how many go at once: through the whole model or,
    `streamed`, through one layer."""
    layers = model.layers[:1] if streamed else model.layers

    def run_one() -> None:
        hidden, calls = record_layer_calls(model, input_ids[:1].to(model.device))
        hidden.requires_grad_(True)
        for layer, call in zip(layers, calls, strict=False):
            hidden = call.run(layer, hidden)
        hidden.backward(torch.zeros_like(hidden))

    return Batches(measured_batch_size(run_one, input_ids.shape[1], model.device))


def loss_gradients(
    model: LayeredModel, hidden: Tensor, input_ids: Tensor, first_sample: int
) -> Tensor:
    """dL/d hidden (B, T, d) of the last layer's output, a few samples at a time, for logits are
    large.

    Raises UserError if a loss is not finite; `first_sample` is the number of the first one in the
    calibration set.
    """
    together = logits_batch(input_ids.shape[1], model.config.vocab_size, hidden.device)
    gradients: list[Tensor] = []
    known: list[Tensor] = []
    for start in range(0, len(hidden), together):
        leaf = hidden[start : start + together].detach().requires_grad_(True)
        losses = losses_from(model, leaf, input_ids[start : start + together])
        gradients += torch.autograd.grad(losses.sum(), leaf)
        known.append(losses.detach())
    require_finite_losses(torch.cat(known), range(first_sample, first_sample + len(hidden)))
    return torch.cat(gradients)


def gradient_scores_reference(
    model: LayeredModel, input_ids: Tensor, unit: Unit = "layer"
) -> Tensor:
    """Eq. 7 as it is written: one sample at a time, every parameter gradient formed. (C,)
    float64."""
    layers, pieces = model.layers, model.pieces(unit)
    totals = torch.zeros(len(pieces), dtype=torch.float64)
    for sample in input_ids:
        layers.requires_grad_(True)
        batch = sample[None].to(model.device)
        sample_losses(
            model.network(input_ids=batch, use_cache=False).logits, batch
        ).sum().backward()
        for index, piece in enumerate(pieces):
            for parameter in piece.parameters():
                assert parameter.grad is not None
                totals[index] += parameter.grad.double().norm().cpu()
        layers.zero_grad()
        layers.requires_grad_(False)
    return scores_of_units(totals, unit) / len(input_ids)


SELECTOR = Selector(
    name="gradient",
    about="the layer whose loss gradient is smallest (Eq. 5-7)",
    paper="GradMAP",
    make=GradientScorer,
    score_label="gradient norm (Eq. 7)",
    round_takes="one forward and one backward pass",
    seconds=in_rounds(score_flops),
)
