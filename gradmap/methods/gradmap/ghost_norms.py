"""Per-sample norms of parameter gradients, without the gradients: from what enters and leaves each
module.

For a linear map with input A (T, d_in) and output gradient G (T, d_out) the gradient of the weight
is G^T A, and

    || G^T A ||_F^2 = sum_{t,u} (A A^T)_{tu} (G G^T)_{tu}

("ghost norm"), cheaper than the gradient itself while samples are short. Parameters never require a
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradmap.common.errors import UserError
from gradmap.model.layerwise import forward_replaced, stacked_on_cpu
from gradmap.model.precision import widened

# From dL/d output: the squared norm of the gradient of each parameter, per sample (B,)
SquaresOf = Callable[[Tensor], dict[str, Tensor]]


@contextmanager
def gradient_norms(pieces: Iterable[nn.Module], samples: int, totals: Tensor) -> Iterator[None]:
    """Adds to `totals` (P,) float64 what Eq. 7 sums: the norm of every parameter's gradient for
    every sample.

    Within the block, one batch of `samples` samples goes forward and then backward through the
    layers that the pieces are, or are parts of. Raises UserError for a module whose parameters are
    used in a way that is not known.
    """
    grams = _GramOfLastInput()
    squares: list[dict[str, Tensor]] = []
    with ExitStack() as hooks:
        for piece in pieces:
            squares.append({})
            for path, module in piece.named_modules():
                if any(True for _ in module.parameters(recurse=False)):
                    hooks.enter_context(_watched(module, path, samples, grams, squares[-1]))
        yield
    norms = [torch.stack(list(of_piece.values())).clamp_min(0).sqrt().sum() for of_piece in squares]
    totals += stacked_on_cpu(norms)


@contextmanager
def _watched(
    module: nn.Module, path: str, samples: int, grams: _GramOfLastInput, squares: dict[str, Tensor]
) -> Iterator[None]:
    """Adds the squared gradient norms of one module's parameters to `squares`: name -> (B,)
    float64."""

    def add_on_backward(output: Tensor, squares_of: SquaresOf) -> None:
        def add(gradient: Tensor) -> None:
            for name, square in squares_of(gradient).items():
                key = f"{path}.{name}"
                squares[key] = squares[key] + square.double() if key in squares else square.double()

        output.register_hook(add)

    dimensions = {
        name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)
    }
    if set(dimensions.values()) == {3}:
        with _watched_experts(module, samples, add_on_backward):
            yield
        return
    if dimensions.get("weight") == 2:
        make_squares = _linear_squares
    elif "weight" in dimensions and set(dimensions.values()) == {1}:
        make_squares = _affine_squares
    else:
        raise UserError(
            f"Gradient norms of {path} ({type(module).__name__}) are not known, so it cannot be "
            "scored."
        )

    def on_forward(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        # a router returns its choice beside its logits
        reached = output[0] if isinstance(output, tuple) else output
        if reached.requires_grad:  # not when a norm is called again, below, to see what it does
            add_on_backward(reached, make_squares(module, args[0].detach(), samples, grams))

    handle = module.register_forward_hook(on_forward)
    try:
        yield
    finally:
        handle.remove()


class _GramOfLastInput:
    """A A^T of the tensor asked for last: the query, key and value projections ask for the same one
    in a row."""

    def __init__(self) -> None:
        self._inputs = self._gram = torch.empty(0)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, T)."""
        # The last tensor is kept alive, so that no other one can be at its address.
        if inputs.data_ptr() != self._inputs.data_ptr() or inputs.shape != self._inputs.shape:
            self._inputs, self._gram = inputs, inputs @ inputs.mT
        return self._gram


def _linear_squares(
    module: nn.Module, inputs: Tensor, samples: int, grams: _GramOfLastInput
) -> SquaresOf:
    """Squared gradient norms of nn.Linear, GPT-2's Conv1D and the router of a mixture of
    experts."""
    inputs = _per_sample(inputs, samples)
    d_out, d_in = module.get_parameter(
        "weight"
    ).shape  # the other way round in Conv1D, which changes no norm
    ghost = ghost_is_cheaper(inputs.shape[1], d_out, d_in)
    kept = grams(inputs) if ghost else inputs

    def squares_of(gradient: Tensor) -> dict[str, Tensor]:
        gradient = _per_sample(gradient, samples)
        squares = {
            "weight": ghost_squares(kept, gradient) if ghost else direct_squares(kept, gradient)
        }
        if getattr(module, "bias", None) is not None:
            squares["bias"] = widened(gradient).sum(dim=1).square().sum(dim=-1)
        return squares

    return squares_of


def _affine_squares(
    module: nn.Module, inputs: Tensor, samples: int, grams: _GramOfLastInput
) -> SquaresOf:
    """Squared gradient norms of a norm: y = w * n(x) + b, where w may stand for 1 + w (Gemma)."""
    plain = _plain_parameters(module)

    def squares_of(gradient: Tensor) -> dict[str, Tensor]:
        gradient = widened(gradient)
        gradients = {
            "weight": gradient * functional_call(module, plain, (inputs,)),
            "bias": gradient,
        }
        return {
            name: _per_sample(gradients[name], samples).sum(dim=1).square().sum(dim=-1)
            for name in plain
        }

    return squares_of


def _plain_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters with which a norm is n(x): no bias, and a weight of 1 or, where it stands for 1 +
    w, of 0.

    Which of the two is asked of the norm itself. The answer stays where the weights are, so that no
    GPU is waited for.
    """
    zeros = {
        name: torch.zeros_like(parameter)
        for name, parameter in module.named_parameters(recurse=False)
    }
    weight = zeros["weight"]
    probe = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)
    adds_one = functional_call(module, zeros, (probe[None],)).any()
    return zeros | {"weight": torch.where(adds_one, weight, torch.ones_like(weight))}


def ghost_is_cheaper(tokens: int, d_out: int, d_in: int) -> bool:
    """Whether two (T, T) Gram matrices cost less than the gradient (d_out, d_in): T (d_in + d_out)
    < d_in d_out."""
    return tokens * (d_in + d_out) < d_in * d_out


def ghost_squares(gram: Tensor, gradient: Tensor) -> Tensor:
    """|| G^T A ||_F^2 per sample from A A^T (B, T, T) and G (B, T, d_out): (B,)."""
    return (widened(gram) * widened(gradient @ gradient.mT)).sum(dim=(1, 2))


def direct_squares(inputs: Tensor, gradient: Tensor) -> Tensor:
    """Squared norms of A^T G from A (B, T, d_in) and G (B, T, d_out): (B,). Forms each sample's
    gradient and drops it at once."""
    return torch.stack(
        [widened(g.mT @ a).square().sum() for a, g in zip(inputs, gradient, strict=True)]
    )


def _per_sample(tensor: Tensor, samples: int) -> Tensor:
    """(B, ..., d) or, where a family flattens batch and time, (B*T, ..., d) -> (B, T*..., d)."""
    return _with_range(tensor.reshape(samples, -1, tensor.shape[-1]))


def _with_range(tensor: Tensor) -> Tensor:
    """float16 ends at 65504, and the square of an attention sink's hidden state does not."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


@contextmanager
def _watched_experts(
    experts: nn.Module, samples: int, add_on_backward: Callable[[Tensor, SquaresOf], None]
) -> Iterator[None]:
    """Runs the experts of a mixture one by one, so that the norms of their stacked weights can be
    taken.

    The weights are `gate_up_proj` (E, 2k, d) and `down_proj` (E, d, k), as transformers stacks
    them: one tensor each for Eq. 7, whose square is the sum over its experts, each of which sees
    only the tokens that are routed to it.
    """

    def watch(name: str, output: Tensor, inputs: Tensor, routed: _Routed) -> Tensor:
        inputs = inputs.detach()

        def squares_of(gradient: Tensor) -> dict[str, Tensor]:
            a, g = _with_range(routed.by_sample(inputs)), _with_range(routed.by_sample(gradient))
            ghost = ghost_is_cheaper(a.shape[1], g.shape[2], a.shape[2])
            return {name: ghost_squares(a @ a.mT, g) if ghost else direct_squares(a, g)}

        add_on_backward(output, squares_of)
        return output

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(B*T, d), expert of every token and choice (B*T, c), its weight (B*T, c) -> (B*T, d)."""
        result = torch.zeros_like(hidden)
        for expert, routed in _route(chosen, samples, len(experts.gate_up_proj)):  # type: ignore[arg-type]
            inputs = hidden[routed.token]
            gate_up = nn.functional.linear(inputs, experts.gate_up_proj[expert])  # type: ignore[index]
            gate, up = watch("gate_up_proj", gate_up, inputs, routed).chunk(2, dim=-1)
            inner = experts.act_fn(gate) * up  # type: ignore[operator]
            down = nn.functional.linear(inner, experts.down_proj[expert])  # type: ignore[index]
            added = (
                watch("down_proj", down, inner, routed) * weights[routed.token, routed.choice, None]
            )
            result = result.index_add(0, routed.token, added.to(result.dtype))
        return result

    with forward_replaced([experts], forward):
        yield


@dataclass(frozen=True)
class _Routed:
    """What one expert is given, (n,) each: tokens, ascending; which choice of the token it is;
    whose sample it is of; and its place among the expert's tokens of that sample. shape: samples,
    and the most tokens of any of them."""

    token: Tensor
    choice: Tensor
    sample: Tensor
    place: Tensor
    shape: tuple[int, int]

    def by_sample(self, rows: Tensor) -> Tensor:
        """(n, d) -> (B, longest, d), padded with zeros, which add nothing to a norm."""
        sorted_rows = rows.new_zeros(*self.shape, rows.shape[-1])
        sorted_rows[self.sample, self.place] = rows
        return sorted_rows


def _route(chosen: Tensor, samples: int, experts: int) -> Iterator[tuple[int, _Routed]]:
    """Every expert that was chosen, and for what: (B*T, c). A GPU is waited for once, for all the
    numbers of tokens."""
    expert, order = chosen.flatten().sort(stable=True)
    token, choice = order // chosen.shape[1], order % chosen.shape[1]
    sample = token // (len(chosen) // samples)
    group = expert * samples + sample
    counts = group.new_zeros(experts * samples).index_add_(0, group, torch.ones_like(group))
    place = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]
    start = 0
    for number, of_samples in enumerate(counts.reshape(experts, samples).tolist()):
        part = slice(start, start + sum(of_samples))
        start = part.stop
        if part.start < part.stop:
            shape = samples, max(of_samples)
            yield number, _Routed(token[part], choice[part], sample[part], place[part], shape)
