"""Stage 1: the importance of a layer is the size of its loss gradient (GradMAP, Eq. 5-7).

    s_i = 1/N sum_j sum_{theta in layer i} || dL(x_j)/d theta ||_2

One norm per parameter tensor and per sample; L is the sum over the T-1 next-token terms of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradmap.architectures import Architecture
from gradmap.errors import UserError
from gradmap.gradient_norms import gradient_norms
from gradmap.layerwise import losses_from, record_layer_calls, sample_losses

# Logits are made for as many samples at once as this allows (float32).
LOGITS_BYTES = 1 << 27


def layer_scores(
    model: Any,
    architecture: Architecture,
    input_ids: Tensor,
    batch_size: int,
    advance: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """Returns Eq. 7 for every layer the model has now: (L,) float64. input_ids: (N, T).

    Batched, and without forming parameter gradients where their norms follow from activations ("ghost norms").
    Only activations carry gradients. Raises UserError if the loss of a sample is not finite.
    """
    layers = architecture.layer_list(model)
    totals = torch.zeros(len(layers), dtype=torch.float64)
    for start in range(0, len(input_ids), batch_size):
        batch = input_ids[start : start + batch_size].to(model.device)
        hidden, calls = record_layer_calls(model, layers, batch)
        hidden.requires_grad_(True)
        with gradient_norms(layers, len(batch), totals):
            for layer, call in zip(layers, calls, strict=True):
                hidden = call.run(layer, hidden)
            hidden.backward(loss_gradients(model, layers, hidden.detach(), batch, start))
        advance(len(batch))
    return totals / len(input_ids)


def loss_gradients(model: Any, layers: nn.ModuleList, hidden: Tensor, input_ids: Tensor, first_sample: int) -> Tensor:
    """dL/d hidden (B, T, d) of the last layer's output, a few samples at a time, for logits are large.

    Raises UserError if a loss is not finite; `first_sample` is the number of the first one in the calibration set.
    """
    together = max(1, LOGITS_BYTES // (4 * input_ids.shape[1] * model.config.vocab_size))
    gradients = []
    for start in range(0, len(hidden), together):
        leaf = hidden[start : start + together].detach().requires_grad_(True)
        losses = losses_from(model, layers, leaf, input_ids[start : start + together])
        _require_finite(losses, first_sample + start)
        gradients += torch.autograd.grad(losses.sum(), leaf)
    return torch.cat(gradients)


def _require_finite(losses: Tensor, first_sample: int) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise UserError(
            f"The loss of calibration sample {first_sample + int(bad[0])} is not finite; "
            f"the checkpoint is damaged, or its dtype overflows (try --dtype float32)."
        )


def layer_scores_reference(model: Any, architecture: Architecture, input_ids: Tensor) -> Tensor:
    """Eq. 7 as it is written: one sample at a time, every parameter gradient formed. (L,) float64."""
    layers = architecture.layer_list(model)
    totals = torch.zeros(len(layers), dtype=torch.float64)
    for sample in input_ids:
        layers.requires_grad_(True)
        batch = sample[None].to(model.device)
        sample_losses(model(input_ids=batch, use_cache=False).logits, batch).sum().backward()
        for index, layer in enumerate(layers):
            for parameter in layer.parameters():
                assert parameter.grad is not None
                totals[index] += parameter.grad.double().norm().cpu()
        layers.zero_grad()
        layers.requires_grad_(False)
    return totals / len(input_ids)
