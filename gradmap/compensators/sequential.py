"""Repairs where something was cut: the retained layer before each run of removed layers, front to back.

Its down projection is fitted so that the layer gives what the last layer of the run gave in the dense model. Later
runs see what earlier corrections did.
"""

from __future__ import annotations

from gradmap.compensation import Compensation, Correction, Pruned
from gradmap.compensators.ridge import Fit, fit_correction

# Candidates for lambda, relative to the mean of the Gram matrix's diagonal.
RELATIVE_LAMBDAS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def project_before_runs(pruned: Pruned) -> Compensation:
    """One W' (d, d) for each run."""
    return _fit_before_runs(pruned, "left")


def refit_before_runs(pruned: Pruned) -> Compensation:
    """W_down (d, k) itself for each run: as many more weights to fit as the FFN is wider than the hidden state."""
    return _fit_before_runs(pruned, "refit")


def _fit_before_runs(pruned: Pruned, kind: str) -> Compensation:
    corrections: list[Correction] = []
    for layer, goal in pruned.runs():
        changes = Compensation(tuple(corrections)).changes
        fit = Fit(layer, goal, kind, weighted=True)
        corrections.append(fit_correction(pruned, fit, changes, RELATIVE_LAMBDAS))
    return Compensation(tuple(corrections))
