"""Corrections in closed form: least squares from Gram matrices that are summed up in one pass over
the samples.

What a layer gives and what it should give differ by D (d, n), one column a token. A change that
adds S F to the layer's output, F (f, n) being something the layer computes, is best, in the sense
of Eq. 10, with

    S = D F^T (F F^T + lam I)^-1

F may be what the down projection adds, A = W_down X (then W' = I + S, Eq. 10-12: W' A = A + S A),
or what enters it, X (then S is added to W_down itself). W' on the right of W_down adds W_down S X.
The algebra is in least_squares.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gradmap.common.console import announced, progress, say
from gradmap.common.distributed import summed
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite
from gradmap.common.machine import available_bytes
from gradmap.methods.compensation import Correction, Pruned
from gradmap.methods.least_squares import RightSolver, plus_identity, ridge_sums, solve_ridge
from gradmap.model.corrections import (
    Change,
    Changes,
    Projection,
    Update,
    followed_by,
    linear_output,
    weight_of,
)
from gradmap.model.precision import widened
from gradmap.model.sublayers import Sublayer
from gradmap.model.walk import Walk

# Candidates for lambda, relative to the mean of the Gram matrix's diagonal. They are tried from the
# middle on until the loss rises, so that those far out cost nothing where they are of no use. The
# last one hardly changes anything.
RELATIVE_LAMBDAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)
REGULARISATION = 1e-3  # of Eq. 12, in Table 8
# Tokens for each input of what is fitted, beyond which more bring little: SmolLM2's refit gained a
# quarter less with 1.2 than with 8.
TOKENS_PER_INPUT = 8


@dataclass(frozen=True)
class Fit:
    """What to fit. sublayer: whose output map is changed, W_down or the attention's output
    projection. goal: the sublayer behind which the hidden state should be what it is in the dense
    model.

    kind: `left` or `right`, a W' on that side of the map, or `refit`, the map itself; or `state`, a
    matrix on all of the hidden state behind the sublayer, which no map holds. weighted: whether
    every token counts by 1 / |target|^2, so that the few with huge norms (attention sinks) do not
    own the fit. exact: whether products are of float64, as a fit needs that is not regularised.
    """

    sublayer: Sublayer
    goal: Sublayer
    kind: str = "left"
    weighted: bool = False
    exact: bool = False


class ClosedForm:
    """The change that a Fit finds, for any lambda: relative to the mean diagonal of the matrix that
    it is added to."""

    def __init__(self, fit: Fit, gram: Tensor, cross: Tensor, weight: Tensor | None) -> None:
        """gram: F F^T (f, f), cross: D F^T (d, f); weight: of the map, (d, k) float64, for `right`.

        Raises UserError if the sum of squares is not finite.
        """
        self._fit, self._gram, self._cross, self._weight = fit, gram, cross, weight
        self._scale = gram.diagonal().mean().item()
        require_finite(f"What {fit.sublayer} gives", self._scale)
        if weight is not None:
            self._scale *= weight.square().sum(dim=0).mean().item()
            self._right = RightSolver(gram, cross, weight)

    def relative_of_mean(self, regularisation: float, tokens: int) -> float:
        """The lambda that stands for a weight of Eq. 12 beside a mean over tokens and channels in
        Eq. 11."""
        return regularisation * tokens * len(self._cross) / self._scale if self._scale else 0.0

    def solve(self, relative_lambda: float) -> tuple[Change, float]:
        """The change, and lambda. Raises UserError where there is no solution without
        regularisation."""
        lam = relative_lambda * self._scale
        if self._weight is not None:
            return Update(self._weight @ self._right.solve(lam)), lam
        solution = solve_ridge(self._gram, self._cross, lam)
        if self._fit.kind == "refit":
            return Update(solution), lam
        return Projection(plus_identity(solution)), lam


# Of one batch: F (B, T, f), D (B, T, d) and the target (B, T, d).
Visit = Callable[[Tensor, Tensor, Tensor], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Walks:
    """The samples to fit on, on their way through the dense and through the pruned model, and the
    held-out ones, if there are any, through the pruned one. Fits from front to back share them, so
    that none begins at layer 0 again.

    wanted: see Pruned.
    """

    dense: Walk
    pruned: Walk
    held_out: Walk | None = None
    wanted: Tensor | None = None

    @classmethod
    def start(cls, pruned: Pruned) -> Walks:
        fit_ids, held_out_ids = pruned.calibration.fit_ids, pruned.calibration.held_out_ids
        to_fit_on = pruned.walk(pruned.sublayers, fit_ids), pruned.walk(pruned.kept, fit_ids)
        if not len(held_out_ids):
            return cls(*to_fit_on)
        return cls(*to_fit_on, pruned.walk(pruned.kept, held_out_ids), pruned.wanted)

    def held_out_divergence(self, changes: Changes) -> float | None:
        """Nats per token, if the rest of the way is gone with the changes; None if nothing is held
        out."""
        if self.held_out is None or self.wanted is None:
            return None
        return self.held_out.divergence(self.wanted, changes)


def fit_correction(
    pruned: Pruned,
    fit: Fit,
    changes: Changes,
    lambdas: Sequence[float],
    walks: Walks | None = None,
    before: float | None = None,
) -> Correction:
    """The change, on top of `changes`, with the lambda (relative, of `lambdas`, in order) of the
    lowest held-out divergence.

    Where nothing is held out to choose by, lambda is the paper's. walks: of the fits before this
    one, in front of its layer at most. before: the held-out divergence without it, if known.
    """
    walks = walks or Walks.start(pruned)
    gram, cross = accumulate_gram(pruned, fit, changes, walks)
    weight = output_weight(pruned, fit.sublayer).to(gram.device) if fit.kind == "right" else None
    closed_form = ClosedForm(fit, gram, cross, weight)
    place = pruned.model.output_of(fit.sublayer)
    if walks.held_out is not None:
        walks.held_out.go_to(fit.sublayer, changes)
    before = walks.held_out_divergence(changes) if before is None else before

    def attempt(relative: float) -> Correction:
        change, lam = closed_form.solve(relative)
        after = walks.held_out_divergence(followed_by(changes, [(place, change)]))
        return Correction(
            place, change, before, after, pruned.accepts(before, after), lam, relative
        )

    if walks.held_out is None and len(lambdas) > 1:
        return attempt(
            closed_form.relative_of_mean(REGULARISATION, pruned.calibration.fit_ids.numel())
        )
    with announced(f"Choosing lambda for {fit.sublayer.words} on held-out samples"):
        return best_downhill(lambdas, attempt, loss=_divergence_after)


def fitted_matrix(
    pruned: Pruned, fit: Fit, changes: Changes, lam: float, walks: Walks | None = None
) -> Projection:
    """I + S (d, d) on top of `changes`, with a lambda that is given: not relative, and not chosen.

    Raises UserError where there is no solution.
    """
    gram, cross = accumulate_gram(pruned, fit, changes, walks)
    return Projection(plus_identity(solve_ridge(gram, cross, lam)))


def fitted_inputs(pruned: Pruned, kind: str) -> int:
    """How many inputs the widest map has that a Fit of this kind finds: d of W', k of the down
    projection."""
    if kind == "left":
        return int(pruned.model.config.hidden_size)
    return weight_of(pruned.model.down_projection(0)).shape[1]


def say_if_tokens_are_few(pruned: Pruned, kind: str) -> None:
    tokens, enough = (
        pruned.calibration.fit_ids.numel(),
        TOKENS_PER_INPUT * fitted_inputs(pruned, kind),
    )
    if tokens < enough:
        say(
            f"{tokens:,} tokens are few to fit so wide a map on, and a fit follows their noise; "
            f"{enough:,} would do: give more --samples, or use --compensator distil, which has the "
            "dense model write what is missing"
        )


def _divergence_after(correction: Correction) -> float:
    assert correction.held_out_divergence_after is not None
    return correction.held_out_divergence_after


def best_downhill(
    values: Sequence[float], attempt: Callable[[float], Result], loss: Callable[[Result], float]
) -> Result:
    """The result with the lowest loss, if along the ordered values the loss falls and then rises:
    tries neighbours, from the middle value on, until it does. Such is lambda: too little of it fits
    noise, too much fits nothing.
    """
    middle = len(values) // 2
    best = attempt(values[middle])
    for further in (values[middle + 1 :], values[:middle][::-1]):
        start = best
        for value in further:
            result = attempt(value)
            if not loss(result) < loss(best):  # nor where it is not a number
                break
            best = result  # no more than two are held: on a GPU, room is dear
        if best is not start:  # it rises the other way
            break
    return best


def accumulate_gram(
    pruned: Pruned, fit: Fit, changes: Changes, walks: Walks | None = None
) -> tuple[Tensor, Tensor]:
    """Returns F F^T (f, f) and D F^T (d, f), float64, over all tokens of the samples to fit on.

    On the model's device, where they are solved with too: a GPU gets little done while it hands out
    matrices of this size for every batch. In the CPU's memory if the device has no room.
    """
    sums: list[Tensor] = []

    def add(features: Tensor, missing: Tensor, target: Tensor) -> None:
        if fit.exact:
            features, missing = features.double(), missing.double()
        device = sums[0].device if sums else device_with_room(features.shape[-1], features.device)
        of_batch = [
            part.to(device)
            for part in ridge_sums(features, missing, target if fit.weighted else None)
        ]
        sums[:] = (
            [total + part for total, part in zip(sums, of_batch, strict=True)] if sums else of_batch
        )

    visit_features(pruned, fit, changes, add, walks)
    gram, cross = sums
    return summed(gram), summed(cross)


def visit_features(
    pruned: Pruned,
    fit: Fit,
    changes: Changes,
    visit: Visit,
    walks: Walks | None = None,
) -> None:
    """Calls `visit` with one batch after the other of the samples to fit on."""
    walks = walks or Walks.start(pruned)
    output_map = pruned.model.map_at(pruned.model.output_of(fit.sublayer))
    multiplier = pruned.model.multiplier(fit.sublayer)
    title = f"Fitting {fit.sublayer.words} (samples)"
    with progress(title, len(walks.pruned.hidden)) as advance:

        def visit_batch(
            samples: slice, captured: list[tuple[Tensor, Tensor]], output: Tensor
        ) -> None:
            ((inputs, added),) = captured
            target = walks.dense.hidden[samples].to(output.device)
            if fit.kind == "state":
                features = output
            elif fit.kind == "left":
                # hooks that correct come first, so that `added` is what the corrected map adds
                features = multiplier * linear_output(output_map, added)
            else:
                features = multiplier * inputs
            features = features.reshape(*target.shape[:2], -1)
            visit(features, widened(target) - widened(output), target)
            advance(len(target))

        walks.dense.go_behind(fit.goal, {})
        walks.pruned.go_to(fit.sublayer, changes)
        walks.pruned.look(fit.sublayer, [output_map], changes, visit_batch)


def all_features(pruned: Pruned, fit: Fit, changes: Changes) -> tuple[Tensor, Tensor]:
    """F (N, T, f) and D (N, T, d) of all samples to fit on, at once."""
    batches: list[tuple[Tensor, Tensor]] = []
    visit_features(
        pruned, fit, changes, lambda features, missing, target: batches.append((features, missing))
    )
    features, missing = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return features, missing


def output_weight(pruned: Pruned, sublayer: Sublayer) -> Tensor:
    """Of its last map, (d, k) float64; of a mixture of experts, each expert has its own, and there
    is none."""
    output_map = pruned.model.map_at(pruned.model.output_of(sublayer))
    return weight_of(output_map).double().cpu()


def device_with_room(size: int, device: torch.device) -> torch.device:
    """`device` or, if a fit of that size does not fit there, the CPU. Raises UserError if it fits
    nowhere."""
    needed = 4 * 8 * size**2  # the sum, one batch's part, the regularised matrix and its factor
    if device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0]:
        return device
    available = available_bytes()
    if needed > available:
        raise UserError(
            f"Gram matrices of {size} x {size} need {needed / 1e9:.1f} GB and "
            f"{available / 1e9:.1f} GB are free; use --compensator sequential, whose matrices are "
            "as wide as the hidden state."
        )
    return torch.device("cpu")
