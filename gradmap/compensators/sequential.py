"""Repairs where something was cut: the retained layer before each run of removed layers, front to back.

Its down projection is fitted so that the layer gives what the last layer of the run gave in the dense model. Later
runs see what earlier corrections did.
"""

from __future__ import annotations

from gradmap.compensation import Compensation, Correction, Pruned, correct_in_turn
from gradmap.compensators.ridge import Fit, fit_correction
from gradmap.corrections import Changes

# Candidates for lambda, relative to the mean of the Gram matrix's diagonal.
RELATIVE_LAMBDAS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def project_before_runs(pruned: Pruned) -> Compensation:
    """One W' (d, d) for each run."""
    return _fit_before_runs(pruned, "left")


def refit_before_runs(pruned: Pruned) -> Compensation:
    """W_down (d, k) itself for each run: as many more weights to fit as the FFN is wider than the hidden state."""
    return _fit_before_runs(pruned, "refit")


def _fit_before_runs(pruned: Pruned, kind: str) -> Compensation:
    def correct(run: tuple[int, int], changes: Changes) -> list[Correction]:
        return [fit_correction(pruned, Fit(*run, kind, weighted=True), changes, RELATIVE_LAMBDAS)]

    return Compensation(correct_in_turn(pruned.runs(), correct))
