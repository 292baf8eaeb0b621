"""Corrections in closed form: least squares from Gram matrices that are summed up in one pass over the samples.

What a layer gives and what it should give differ by D (d, n), one column a token. A change that adds S F to the
layer's output, F (f, n) being something the layer computes, is best, in the sense of Eq. 10, with

    S = D F^T (F F^T + lam I)^-1

F may be what the down projection adds, A = W_down X (then W' = I + S, Eq. 10-12: W' A = A + S A), or what enters it,
X (then S is added to W_down itself). W' on the right of W_down adds W_down S X, which `solve_right` finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from gradmap.architectures import without_layers
from gradmap.compensation import Correction, Pruned, run_and_capture
from gradmap.console import progress
from gradmap.corrections import (
    Change,
    Changes,
    Place,
    Projection,
    Update,
    followed_by,
    linear_output,
    pruned_and_corrected,
    weight_of,
)
from gradmap.distributed import share_of, summed
from gradmap.errors import UserError

# Candidates for lambda, relative to the mean of the Gram matrix's diagonal.
RELATIVE_LAMBDAS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
SINGULAR = 1e-13  # relative: what float64 makes of a zero


@dataclass(frozen=True)
class Fit:
    """What to fit. layer: whose down projection is changed. goal: the layer whose dense output it should give.

    kind: `left` or `right`, a W' on that side of W_down, or `refit`, W_down itself. weighted: whether every token
    counts by 1 / |target|^2, so that the few with huge norms (attention sinks) do not own the fit.
    """

    layer: int
    goal: int
    kind: str = "left"
    weighted: bool = False


class ClosedForm:
    """The change that a Fit finds, for any lambda: relative to the mean diagonal of the matrix that it is added to."""

    def __init__(self, fit: Fit, gram: Tensor, cross: Tensor, weight: Tensor | None) -> None:
        """gram: F F^T (f, f), cross: D F^T (d, f); weight: W_down (d, k) float64, for `right`."""
        self._fit, self._gram, self._cross, self._weight = fit, gram, cross, weight
        self._scale = gram.diagonal().mean().item()
        if weight is not None:
            self._scale *= weight.square().sum(dim=0).mean().item()

    def solve(self, relative_lambda: float) -> tuple[Change, float]:
        """The change, and lambda. Raises UserError where there is no solution without regularisation."""
        lam = relative_lambda * self._scale
        try:
            if self._weight is not None:
                return Update(self._weight @ solve_right(self._gram, self._cross, self._weight, lam)), lam
            solution = solve_ridge(self._gram, self._cross, lam)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise UserError("There are too few calibration tokens to fit without regularisation.") from None
        if self._fit.kind == "refit":
            return Update(solution), lam
        return Projection(plus_identity(solution)), lam


def fit_correction(pruned: Pruned, fit: Fit, changes: Changes, lambdas: Sequence[float]) -> Correction:
    """The change with the lambda (relative, of `lambdas`) of the lowest held-out loss, on top of `changes`."""
    if fit.kind != "left":
        _require_one_down_projection(pruned)
    gram, cross = accumulate_gram(pruned, fit, changes)
    weight = down_projection_weight(pruned, fit.layer).to(gram.device) if fit.kind == "right" else None
    closed_form = ClosedForm(fit, gram, cross, weight)
    place = Place(fit.layer, pruned.architecture.down_projection)
    best: Correction | None = None
    with progress(f"Choosing lambda for layer {fit.layer} on held-out samples", 1 + len(lambdas)) as advance:
        before = pruned.loss(changes)
        advance(1)
        for relative in lambdas:
            change, lam = closed_form.solve(relative)
            after = pruned.loss(followed_by(changes, [(place, change)]))
            if best is None or after < best.held_out_loss_after:  # only one is kept: on a GPU, room is dear
                best = Correction(place, change, before, after, lam, relative)
            advance(1)
    assert best is not None, "no lambda to choose from"
    return best


def accumulate_gram(pruned: Pruned, fit: Fit, changes: Changes) -> tuple[Tensor, Tensor]:
    """Returns F F^T (f, f) and D F^T (d, f), float64, over all tokens of the samples to fit on.

    On the model's device, where they are solved with too: a GPU gets little done while it hands out matrices of this
    size for every batch. In the CPU's memory if the device has no room.
    """
    gram = cross = torch.zeros((), dtype=torch.float64)
    for features, missing, target in features_and_missing(pruned, fit, changes):
        if gram.dim() == 0:
            device = device_with_room(features.shape[-1], features.device)
            gram, cross = gram.to(device), cross.to(device)
        of_batch = ridge_sums(features, missing, target if fit.weighted else None)
        gram, cross = gram + of_batch[0].to(gram.device), cross + of_batch[1].to(cross.device)
    return summed(gram), summed(cross)


def features_and_missing(pruned: Pruned, fit: Fit, changes: Changes) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """F, D and the target of one batch after the other: (B, T, f), (B, T, d), (B, T, d). No layer runs needlessly."""
    model, architecture = pruned.model, pruned.architecture
    layers = architecture.layer_list(model)
    layer, goal = layers[fit.layer], layers[fit.goal]
    behind_goal = range(fit.goal + 1, len(layers))
    behind_layer = sorted({*pruned.removed, *range(fit.layer + 1, len(layers))})
    changes = {place: of_place for place, of_place in changes.items() if place.layer <= fit.layer}
    projection = architecture.down_projection_of(layer)
    share, _ = share_of(pruned.calibration.fit_ids)
    with progress(f"Fitting layer {fit.layer} (samples)", len(share)) as advance:
        for batch in share.split(pruned.batch_size):
            with without_layers(model, architecture, behind_goal):
                ((_, target),) = run_and_capture(model, [goal], batch)
            with pruned_and_corrected(model, architecture, behind_layer, changes):
                (_, output), (inputs, added) = run_and_capture(model, [layer, projection], batch)
            # hooks that correct come first, so that `added` is what the corrected map adds
            features = linear_output(projection, added) if fit.kind == "left" else inputs
            yield features.reshape(*target.shape[:2], -1), widened(target) - widened(output), target
            advance(len(batch))


def ridge_sums(features: Tensor, missing: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """F F^T (f, f) and D F^T (d, f), float64: products in float32 at least, whatever the model computes in.

    features: (..., f), missing: (..., d). target: (..., d); tokens count by 1 / |target|^2 if it is given.
    """
    features, missing = _rows(features), _rows(missing)
    weighted = features if target is None else features / _rows(target).square().sum(dim=1, keepdim=True)
    with torch.autocast(features.device.type, enabled=False):
        return (weighted.mT @ features).double(), (missing.mT @ weighted).double()


def solve_ridge(gram: Tensor, cross: Tensor, lam: float) -> Tensor:
    """S = cross (gram + lam I)^-1: (f, f), (d, f) -> (d, f), all float64."""
    regularised = gram.clone()
    regularised.diagonal().add_(lam)
    return torch.cholesky_solve(cross.mT, torch.linalg.cholesky(regularised)).mT


def plus_identity(matrix: Tensor) -> Tensor:
    """I + matrix, (d, d)."""
    return matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def solve_right(gram: Tensor, cross: Tensor, weight: Tensor, lam: float) -> Tensor:
    """S (k, k) with the least |D - W S X|^2 + lam |S|^2, from X X^T (k, k), D X^T (d, k) and W (d, k), all float64.

    The normal equations, W^T W S X X^T + lam S = W^T D X^T, fall apart in the eigenvectors of the two matrices.
    """
    left_values, left = torch.linalg.eigh(weight.mT @ weight)
    right_values, right = torch.linalg.eigh(gram)
    divisor = left_values.clamp(min=0)[:, None] * right_values.clamp(min=0) + lam
    rotated = left.mT @ weight.mT @ cross @ right
    # where nothing is observed and nothing regularised, the least S is 0
    solution: Tensor = left @ torch.where(divisor > divisor.max() * SINGULAR, rotated / divisor, 0) @ right.mT
    return solution


def solve_ridge_reference(features: Tensor, missing: Tensor, lam: float) -> Tensor:
    """The same by least squares on the stacked system [F^T; sqrt(lam) I] S^T = [D^T; 0].

    features: (n, f), missing: (n, d), rows are tokens.
    """
    size = features.shape[1]
    stacked = torch.cat([features, lam**0.5 * torch.eye(size, dtype=features.dtype)])
    goal = torch.cat([missing, missing.new_zeros(size, missing.shape[1])])
    solution: Tensor = torch.linalg.lstsq(stacked, goal).solution
    return solution.mT


def down_projection_weight(pruned: Pruned, layer: int) -> Tensor:
    """W_down (d, k) float64. Raises UserError for a mixture of experts, each of which has its own."""
    _require_one_down_projection(pruned)
    module = pruned.architecture.down_projection_of(pruned.architecture.layer_list(pruned.model)[layer])
    return weight_of(module).double().cpu()


def _require_one_down_projection(pruned: Pruned) -> None:
    if pruned.architecture.expert_down_projections is not None:
        raise UserError("A mixture of experts has many down projections, which cannot be refitted; use sequential.")


def _rows(tensor: Tensor) -> Tensor:
    """(..., d) -> (n, d), in float32 at least."""
    return widened(tensor).flatten(end_dim=-2)


def widened(tensor: Tensor) -> Tensor:
    """In float32 at least: a difference of two hidden states is far smaller than they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def device_with_room(size: int, device: torch.device) -> torch.device:
    """`device` or, if a fit of that size does not fit there, the CPU. Raises UserError if it fits nowhere."""
    needed = 4 * 8 * size**2  # the sum, one batch's part, the regularised matrix and its factor
    if device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0]:
        return device
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"Gram matrices of {size} x {size} need {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free; use "
            "--compensator sequential, whose matrices are as wide as the hidden state."
        )
    return torch.device("cpu")
