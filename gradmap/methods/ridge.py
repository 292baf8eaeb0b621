"""Corrections in closed form: least squares from Gram matrices that are summed up in one pass over
the samples.

What a layer gives and what it should give differ by D (d, n), one column a token. A change that
adds S F to the layer's output, F (f, n) being something the layer computes, is best, in the sense
of Eq. 10, with

    S = D F^T (F F^T + lam I)^-1

F may be what the down projection adds, A = W_down X (then W' = I + S, Eq. 10-12: W' A = A + S A),
or what enters it, X (then S is added to W_down itself). W' on the right of W_down adds W_down S X.
The algebra is in least_squares.py, and what differs where a norm follows the map in normed.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from gradmap.common.console import announced, say
from gradmap.common.finite import require_finite
from gradmap.methods.compensation import Correction, Pruned
from gradmap.methods.features import Fit, Walks, accumulate_gram, output_weight
from gradmap.methods.least_squares import RightSolver, plus_identity, solve_ridge
from gradmap.methods.normed import before_gain, fit_gain
from gradmap.model.corrections import (
    Change,
    Changes,
    Place,
    Projection,
    Update,
    followed_by,
    weight_of,
)

# Candidates for lambda, relative to the mean of the Gram matrix's diagonal. They are tried from the
# middle on until the loss rises, so that those far out cost nothing where they are of no use. The
# last one hardly changes anything.
RELATIVE_LAMBDAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)
# Where a norm follows, all of them are tried.
NORMED_LAMBDAS = (0.1, 1.0, 10.0, 100.0)
REGULARISATION = 1e-3  # of Eq. 12, in Table 8
# Tokens for each input of what is fitted, beyond which more bring little: SmolLM2's refit gained a
# quarter less with 1.2 than with 8.
TOKENS_PER_INPUT = 8


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


Result = TypeVar("Result")


def fit_correction(
    pruned: Pruned,
    fit: Fit,
    changes: Changes,
    lambdas: Sequence[float] | None = None,
    walks: Walks | None = None,
    before: float | None = None,
) -> tuple[Correction, ...]:
    """The change, on top of `changes`, with the lambda (relative, of `lambdas`, in order; if none
    are given, RELATIVE_LAMBDAS or NORMED_LAMBDAS) of the lowest held-out divergence; and, where a
    norm follows the map, the norm's gain that goes with it.

    Where nothing is held out to choose by, lambda is the paper's. walks: of the fits before this
    one, in front of its layer at most. before: the held-out divergence without it, if known.
    """
    walks = walks or Walks.start(pruned)
    norm = pruned.model.norm_behind(fit.sublayer)
    gram, cross = accumulate_gram(pruned, fit, changes, walks)
    if norm is not None:
        cross = before_gain(cross, pruned.model.gain_at(norm))
    if lambdas is None:
        lambdas = RELATIVE_LAMBDAS if norm is None else NORMED_LAMBDAS
    weight = output_weight(pruned, fit.sublayer).to(gram.device) if fit.kind == "right" else None
    closed_form = ClosedForm(fit, gram, cross, weight)
    place = pruned.model.output_of(fit.sublayer)
    if walks.held_out is not None:
        walks.held_out.go_to(fit.sublayer, changes)
    before = walks.held_out_divergence(changes) if before is None else before

    def attempt(relative: float) -> tuple[Correction, ...]:
        change, lam = closed_form.solve(relative)
        pairs: list[tuple[Place, Change]] = [(place, change)]
        if norm is not None:
            pairs.append(fit_gain(pruned, fit, norm, followed_by(changes, pairs), walks))
        after = walks.held_out_divergence(followed_by(changes, pairs))
        accepted = pruned.accepts(before, after)
        return tuple(
            Correction(place, change, before, after, accepted, lam, relative)
            for place, change in pairs
        )

    if walks.held_out is None and len(lambdas) > 1:
        return attempt(
            closed_form.relative_of_mean(REGULARISATION, pruned.calibration.fit_ids.numel())
        )
    with announced(f"Choosing lambda for {fit.sublayer.words} on held-out samples"):
        if norm is not None:  # along them, the divergence may fall again after it rose
            return min(map(attempt, lambdas), key=_divergence_after)
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


def _divergence_after(corrections: Sequence[Correction]) -> float:
    divergence = corrections[0].held_out_divergence_after
    assert divergence is not None
    return divergence


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
