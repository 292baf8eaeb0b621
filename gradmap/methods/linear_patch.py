"""LinearPatch (Chen et al. 2025, arXiv 2505.24680): the hidden state before a cut is scaled,
channel by channel, to what it was behind the removed layers, in a rotated basis in which a few huge
channels are spread over all.

P = H diag(s) H^T, with H a Hadamard matrix. It acts on the hidden state itself, which no stock
layer can hold, so that a plan with it can be evaluated in memory, and not exported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import hadamard
from torch import Tensor

from gradmap.common.distributed import summed
from gradmap.common.errors import UserError
from gradmap.methods.base import Compensator
from gradmap.methods.compensation import Compensation, Correction, Pruned, Run, correct_in_turn
from gradmap.methods.features import Fit, visit_features
from gradmap.model.corrections import HIDDEN_STATE, Changes, Place, Projection


def patch_before_runs(pruned: Pruned) -> Compensation:
    """One P behind the retained layer before each run of removed layers, front to back."""

    def correct(run: Run, changes: Changes) -> tuple[Correction, ...]:
        patch = Projection(_fit_patch(pruned, Fit(run.before, run.last), changes))
        return pruned.judge([(Place(run.before.layer, HIDDEN_STATE), patch)], changes)

    return Compensation(correct_in_turn(pruned.runs(), correct))


def _fit_patch(pruned: Pruned, fit: Fit, changes: Changes) -> Tensor:
    """P (d, d) float64. s: mean |wanted H| / mean |given H| over positions, averaged over
    samples."""
    width = pruned.model.config.hidden_size
    basis = torch.from_numpy(hadamard_matrix(width)) / width**0.5
    total = torch.zeros(width, dtype=torch.float64)

    def add(features: Tensor, missing: Tensor, wanted: Tensor) -> None:
        wanted, missing = wanted.double().cpu(), missing.double().cpu()
        rotated, given = wanted @ basis, (wanted - missing) @ basis
        total.add_((rotated.abs().mean(dim=1) / given.abs().mean(dim=1)).sum(dim=0))

    visit_features(pruned, fit, changes, add)
    ratios = summed(total) / len(pruned.calibration.fit_ids)
    patch: Tensor = basis @ ratios.diag() @ basis.mT
    return patch


def hadamard_matrix(size: int) -> NDArray[Any]:
    """A square matrix of 1 and -1 with orthogonal rows: Sylvester's doubling of one of Paley's
    (1933).

    Raises UserError if these constructions give none of that size.
    """
    if size & (size - 1) == 0:
        return np.asarray(hadamard(size), dtype=np.float64)
    if size % 4 == 0 and _is_prime(size - 1):
        return np.asarray(np.eye(size) + _bordered(size - 1, sign=-1))
    order = size // 2
    if size % 4 == 0 and _is_prime(order - 1) and (order - 1) % 4 == 1:
        symmetric = _bordered(order - 1, sign=1)
        signs = np.kron(symmetric, [[1.0, 1.0], [1.0, -1.0]])
        diagonal = np.kron(np.eye(order), [[1.0, -1.0], [-1.0, -1.0]])
        return np.asarray(signs + diagonal)
    if size % 2:
        raise UserError(
            "No Hadamard matrix is known that is as wide as the hidden state; use --compensator "
            "refit."
        )
    return np.asarray(np.kron([[1.0, 1.0], [1.0, -1.0]], hadamard_matrix(order)))


def _bordered(prime: int, sign: int) -> NDArray[Any]:
    """Quadratic residues modulo a prime as 1, the others as -1, in a circulant matrix, with a
    border."""
    residues = {number * number % prime for number in range(1, prime)}
    first = np.array([0.0, *(1.0 if number in residues else -1.0 for number in range(1, prime))])
    bordered = np.zeros((prime + 1, prime + 1))
    bordered[0, 1:], bordered[1:, 0] = 1, sign
    bordered[1:, 1:] = [
        [first[(row - column) % prime] for column in range(prime)] for row in range(prime)
    ]
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


PATCHES_STATES = "patches the hidden state between layers, so that whole ones must go"
COMPENSATOR = Compensator(
    name="linear-patch",
    about="scales the hidden state before a cut, channel by channel; cannot be exported",
    paper="LinearPatch (arXiv 2505.24680)",
    run=patch_before_runs,
    whole_layers=PATCHES_STATES,
)
