"""The algebra of least squares with a ridge: from sums over tokens to what fits best (Eq.
10-12)."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite
from gradmap.model.precision import widened

SINGULAR = 1e-13  # relative: what float64 makes of a zero


def ridge_sums(features: Tensor, missing: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """F F^T (f, f) and D F^T (d, f), float64: products in float32 at least, whatever the model
    computes in.

    features: (..., f), missing: (..., d). target: (..., d); tokens count by 1 / |target|^2 if it is
    given.
    """
    features, missing = _rows(features), _rows(missing)
    weighted = (
        features if target is None else features / _rows(target).square().sum(dim=1, keepdim=True)
    )
    with torch.autocast(features.device.type, enabled=False):
        return (weighted.mT @ features).double(), (missing.mT @ weighted).double()


def solve_ridge(gram: Tensor, cross: Tensor, lam: float | Tensor) -> Tensor:
    """S = cross (gram + lam I)^-1: (f, f), (d, f), () -> (d, f), all float64.

    Where nothing is observed and nothing regularised, S is 0. Raises UserError where else there is
    no such inverse.
    """
    regularised = gram.clone()
    regularised.diagonal().add_(lam)
    factor, failed = torch.linalg.cholesky_ex(regularised)
    if not failed:
        return torch.cholesky_solve(cross.mT, factor).mT
    require_finite("What is fitted on", gram, cross)
    if regularised.any():
        raise UserError("There are too few calibration tokens to fit without regularisation.")
    return torch.zeros_like(cross)


def plus_identity(matrix: Tensor) -> Tensor:
    """I + matrix, (d, d)."""
    return matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


class RightSolver:
    """S (k, k) with the least |D - W S X|^2 + lam |S|^2, from X X^T (k, k), D X^T (d, k) and W (d,
    k), all float64.

    The normal equations, W^T W S X X^T + lam S = W^T D X^T, fall apart in the eigenvectors of the
    two matrices, which are found once for all lam.
    """

    def __init__(self, gram: Tensor, cross: Tensor, weight: Tensor) -> None:
        left_values, self._left = torch.linalg.eigh(weight.mT @ weight)
        right_values, self._right = torch.linalg.eigh(gram)
        self._products = left_values.clamp(min=0)[:, None] * right_values.clamp(min=0)
        self._rotated = self._left.mT @ weight.mT @ cross @ self._right

    def solve(self, lam: float) -> Tensor:
        divisor = self._products + lam
        # where nothing is observed and nothing regularised, the least S is 0
        rotated = torch.where(divisor > divisor.max() * SINGULAR, self._rotated / divisor, 0)
        solution: Tensor = self._left @ rotated @ self._right.mT
        return solution


def solve_ridge_reference(features: Tensor, missing: Tensor, lam: float) -> Tensor:
    """`solve_ridge` by least squares on the stacked system [F^T; sqrt(lam) I] S^T = [D^T; 0].

    features: (n, f), missing: (n, d), rows are tokens.
    """
    size = features.shape[1]
    stacked = torch.cat([features, lam**0.5 * torch.eye(size, dtype=features.dtype)])
    goal = torch.cat([missing, missing.new_zeros(size, missing.shape[1])])
    solution: Tensor = torch.linalg.lstsq(stacked, goal).solution
    return solution.mT


def _rows(tensor: Tensor) -> Tensor:
    """(..., d) -> (n, d), in float32 at least."""
    return widened(tensor).flatten(end_dim=-2)
