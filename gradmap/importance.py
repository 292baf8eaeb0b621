"""Stage 1: the importance of a layer is the size of its loss gradient (GradMAP, Eq. 5-7).

    s_i = 1/N sum_j sum_{theta in layer i} || dL(x_j)/d theta ||_2

One norm per parameter tensor and per sample; L is the sum over the T-1 next-token terms of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from gradmap.architectures import Architecture
from gradmap.errors import UserError


def sample_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy of Eq. 5: the sum over next tokens, per sample. (B, T, V), (B, T) -> (B,) float32 or wider."""
    precise = logits if logits.dtype == torch.float64 else logits.float()
    token_losses = nn.functional.cross_entropy(precise[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
    return token_losses.sum(dim=1)


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
        with _gradient_norms(layers, len(batch), totals), _embeddings_with_gradient(model):
            losses = sample_losses(model(input_ids=batch, use_cache=False).logits, batch)
            _require_finite(losses, start)
            losses.sum().backward()
        advance(len(batch))
    return totals / len(input_ids)


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


def _require_finite(losses: Tensor, first_sample: int) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise UserError(
            f"The loss of calibration sample {first_sample + int(bad[0])} is not finite; "
            f"the checkpoint is damaged, or its dtype overflows (try --dtype float32)."
        )


@contextmanager
def _embeddings_with_gradient(model: Any) -> Iterator[None]:
    """Starts the autograd graph at the embeddings' output, since no parameter requires a gradient."""
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _gradient_norms(layers: nn.ModuleList, batch_size: int, totals: Tensor) -> Iterator[None]:
    """Adds to `totals` (L,), during backward, the gradient norms of each layer's parameters, summed over samples."""
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            for module in layer.modules():
                if any(True for _ in module.parameters(recurse=False)):
                    hooks.callback(_add_norms(module, totals[index : index + 1], batch_size).remove)
        yield


def _add_norms(module: nn.Module, total: Tensor, batch_size: int) -> RemovableHandle:
    """Adds one module's gradient norms to `total` (1,) during the next backward pass."""

    def on_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        handle.remove()  # once per forward pass: differentiating a module by vjp calls it again
        inputs = _per_sample(args[0].detach(), batch_size)

        def on_backward(gradient: Tensor) -> None:
            squares = squared_gradient_norms(module, inputs, _per_sample(gradient, batch_size))
            total.add_(sum(square.double().clamp_min(0).sqrt().sum().cpu() for square in squares.values()))

        output.register_hook(on_backward)

    handle = module.register_forward_hook(on_forward)
    return handle


def _per_sample(tensor: Tensor, batch_size: int) -> Tensor:
    """Undoes the flattening of batch and time that some families (OPT) do around their FFN."""
    return tensor if tensor.shape[0] == batch_size else tensor.reshape(batch_size, -1, tensor.shape[-1])


def squared_gradient_norms(module: nn.Module, inputs: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """|| dL/d theta ||_2^2 of a leaf module's parameters, per sample: name -> (B,).

    inputs: (B, T, d_in); gradient: dL/d output, (B, T, d_out).
    """
    if not isinstance(module, nn.Linear | Conv1D):
        return _squared_norms_by_vjp(module, inputs, gradient)
    squares = {"weight": squared_weight_norm(inputs, gradient)}
    if module.bias is not None:
        squares["bias"] = gradient.sum(dim=1).square().sum(dim=-1)
    return squares


def squared_weight_norm(inputs: Tensor, gradient: Tensor) -> Tensor:
    """|| sum_t g_t a_t^T ||_F^2 of a linear map, per sample: (B, T, d_in), (B, T, d_out) -> (B,).

    It equals sum_{t,u} (A A^T)_{tu} (G G^T)_{tu}, which is cheaper than the gradient itself for short samples.
    """
    tokens, d_in, d_out = inputs.shape[1], inputs.shape[2], gradient.shape[2]
    if tokens * (d_in + d_out) < d_in * d_out:
        return ((inputs @ inputs.mT) * (gradient @ gradient.mT)).sum(dim=(1, 2))
    return (gradient.mT @ inputs).square().sum(dim=(1, 2))


def _squared_norms_by_vjp(module: nn.Module, inputs: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """For small modules (norms) of any formula: differentiate the module itself, one sample per vmap lane."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}

    def sample_gradients(sample: Tensor, sample_gradient: Tensor) -> dict[str, Tensor]:
        pull_back = vjp(lambda values: functional_call(module, values, (sample,)), parameters)[1]
        gradients: dict[str, Tensor] = pull_back(sample_gradient)[0]
        return gradients

    per_sample = vmap(sample_gradients)(inputs, gradient)
    return {name: value.flatten(start_dim=1).square().sum(dim=1) for name, value in per_sample.items()}
