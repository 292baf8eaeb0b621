"""Runs a model layer by layer: what goes into the first layer, every layer's other arguments, and
the loss at the end.

transformers builds masks and position embeddings in the model's own forward, each family in its own
way. So the model itself is run with its layers made to pass their input on, and the arguments it
calls them with are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gradmap.model.batching import logits_parts
from gradmap.model.layered import LayeredModel
from gradmap.model.precision import widened
from gradmap.model.sublayers import PIECES, Unit


@dataclass(frozen=True)
class LayerCall:
    """What a model gives to one of its layers besides the hidden state: mask, position embeddings,
    and the like."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        output = layer(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


@torch.no_grad()
def record_layer_calls(model: LayeredModel, input_ids: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """Returns the hidden state that enters the first layer, (B, T, d), and the call of each layer.
    No layer is run."""
    entering: list[Tensor] = []
    calls: list[LayerCall] = []

    def pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        entering.append(hidden)
        calls.append(LayerCall(args, kwargs))
        return model.as_layer_output(hidden)

    with forward_replaced(model.layers, pass_on):
        model.network.base_model(input_ids=input_ids, use_cache=False)
    return entering[0], calls


class LayerCalls:
    """The calls of each layer, for any number of samples of one length: some families give their
    layers other tensors with more samples (Bloom)."""

    def __init__(self, model: LayeredModel, input_ids: Tensor) -> None:
        """input_ids: samples (N, T), of which the first is enough."""
        self._model, self._sample = model, input_ids[:1].to(model.device)
        self._by_size: dict[int, list[LayerCall]] = {}

    def of(self, layer: int, samples: int) -> LayerCall:
        """layer: its place in the model as it is when it is asked for the first time."""
        if samples not in self._by_size:
            input_ids = self._sample.expand(samples, -1)
            _, self._by_size[samples] = record_layer_calls(self._model, input_ids)
        return self._by_size[samples][layer]


@dataclass(frozen=True)
class Piece:
    """A layer or a sublayer, and what the model gives to it."""

    module: nn.Module
    call: LayerCall

    def run(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.call.run(self.module, hidden)


def record_pieces(
    model: LayeredModel, input_ids: Tensor, unit: Unit = "layer"
) -> tuple[Tensor, list[Piece]]:
    """Returns the hidden state that enters the first layer, (B, T, d), and the pieces that a unit
    is made of, to be run one after the other. input_ids: (B, T)."""
    hidden, calls = record_layer_calls(model, input_ids)
    of_layer = PIECES[unit]
    return hidden, [
        Piece(module, calls[place // of_layer]) for place, module in enumerate(model.pieces(unit))
    ]


def passes(
    model: LayeredModel, input_ids: Tensor, unit: Unit = "layer"
) -> Iterator[tuple[Tensor, Tensor]]:
    """What enters and what leaves each piece, one after the other: (B, T) -> (B, T, d) both."""
    hidden, pieces = record_pieces(model, input_ids, unit)
    for piece in pieces:
        entering, hidden = hidden, piece.run(hidden)
        yield entering, hidden


def run_layers(model: LayeredModel, input_ids: Tensor, recompute: bool = False) -> Tensor:
    """The output of the last layer: (B, T) -> (B, T, d). recompute: keep only what enters each
    layer for a backward pass, which runs it again (Chen et al. 2016, arXiv 1604.06174)."""
    hidden, pieces = record_pieces(model, input_ids)
    for piece in pieces:
        hidden = (
            checkpoint(piece.run, hidden, use_reentrant=False) if recompute else piece.run(hidden)
        )
    return hidden


def stacked_on_cpu(of_layers: Sequence[Tensor]) -> Tensor:
    """What was computed of each layer, (...) each, as one tensor (L, ...) in the CPU's memory.

    A GPU is waited for whenever something is fetched, so all is fetched at once. Layers may be on
    several GPUs.
    """
    return torch.stack([tensor.to(of_layers[0].device) for tensor in of_layers]).cpu()


def logits_from(model: LayeredModel, hidden: Tensor, input_ids: Tensor) -> Tensor:
    """What the model makes of the output of its last layer: (B, T, d), (B, T) -> (B, T, V)."""
    leaving = model.as_layer_output(hidden)
    with forward_replaced(model.layers, lambda *args, **kwargs: leaving):
        logits: Tensor = model.network(input_ids=input_ids, use_cache=False).logits
    return logits


def losses_from(model: LayeredModel, hidden: Tensor, input_ids: Tensor) -> Tensor:
    """The loss of Eq. 5 of each sample, given the output of the last layer: (B, T, d), (B, T) ->
    (B,)."""
    logits = logits_from(model, hidden, input_ids)
    losses: Tensor = _SumOfTokenLosses.apply(logits, input_ids.to(logits.device))
    return losses


def sample_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy of Eq. 5: the sum over next tokens, per sample. (B, T, V), (B, T) -> (B,)
    float32 or wider."""
    predictions = widened(logits)[:, :-1].flatten(end_dim=1)
    targets = input_ids[:, 1:].to(logits.device)
    token_losses = nn.functional.cross_entropy(predictions, targets.flatten(), reduction="none")
    return token_losses.reshape(targets.shape).sum(dim=1)


def divergences_from(
    model: LayeredModel, hidden: Tensor, wanted: Tensor, input_ids: Tensor
) -> Tensor:
    """`sample_divergences` of the output of the last layer from what it is in the dense model: (B,
    T, d) both, (B, T) -> (B,). Some positions at a time."""
    samples, tokens = input_ids.shape
    divergences = torch.zeros(samples, dtype=torch.float64, device=hidden.device)
    for part in logits_parts(samples, tokens, 2 * model.config.vocab_size, hidden.device):
        both = torch.cat([hidden[part], wanted[part]])
        logits, dense = logits_from(model, both, input_ids[part].repeat(2, 1)).chunk(2)
        divergences[part[0]] += sample_divergences(logits, dense)
    return divergences


def sample_divergences(logits: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || model) of the next-token distributions: the sum over positions, per sample, in
    nats. (B, T, V) both -> (B,) float32 or wider."""
    logits, dense = widened(logits), widened(dense)
    expected = (dense.softmax(dim=-1) * (dense - logits)).sum(dim=-1)
    return (expected - dense.logsumexp(dim=-1) + logits.logsumexp(dim=-1)).sum(dim=1)


def sample_divergences_reference(logits: Tensor, dense: Tensor) -> Tensor:
    """`sample_divergences` by the definition, one position after the other: (B, T, V) both ->
    (B,)."""
    divergences = torch.zeros(len(logits), dtype=logits.dtype)
    for sample, position in product(*map(range, logits.shape[:2])):
        given, wanted = (
            logits[sample, position].softmax(dim=-1),
            dense[sample, position].softmax(dim=-1),
        )
        divergences[sample] += (wanted * (wanted / given).log()).sum()
    return divergences


class _SumOfTokenLosses(torch.autograd.Function):
    """`sample_losses` with its gradient made in the buffer of the probabilities, for logits are the
    largest tensor."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, input_ids: Tensor) -> Tensor:
        precise = widened(logits)
        highest, at = precise.max(dim=-1, keepdim=True)
        probabilities = precise.softmax(dim=-1)
        # of the exponentials: p_max = exp(highest - log_sum)
        log_sum = highest - probabilities.gather(-1, at).log()
        ctx.probabilities, ctx.targets, ctx.dtype = (
            probabilities,
            input_ids[:, 1:, None],
            logits.dtype,
        )
        return (log_sum[:, :-1] - precise[:, :-1].gather(-1, ctx.targets)).sum(dim=(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        result, ctx.probabilities = ctx.probabilities, None
        result[:, :-1].scatter_add_(
            -1, ctx.targets, torch.full_like(ctx.targets, -1, dtype=result.dtype)
        )
        result[:, -1] = 0  # the last position predicts nothing
        return result.mul_(gradient[:, None, None]).to(ctx.dtype), None


@contextmanager
def capturing(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Yields what entered and what left each module when it ran last in the block: (B, T, ...), or
    (B*T, ...) where a family flattens."""
    captured: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def on_forward(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        captured[module] = entering, output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(on_forward, with_kwargs=True).remove)
        yield captured


@contextmanager
def forward_replaced(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Calls `forward` in place of each module's own, and puts what was there back afterwards."""
    with ExitStack() as stack:
        for module in modules:
            if "forward" in vars(module):  # a wrapper that a library (accelerate) put there
                stack.callback(setattr, module, "forward", module.forward)
            else:
                stack.callback(delattr, module, "forward")
            module.forward = forward
        yield
