"""Repairs where something was cut: the retained layer before each run of removed layers, front to
back.

Its down projection is fitted so that the layer gives what the last layer of the run gave in the
dense model. Later runs see what earlier corrections did.
"""

from __future__ import annotations

from gradmap.costs.timing import refit_seconds, sequential_seconds
from gradmap.methods.base import Compensator
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.ridge import (
    RELATIVE_LAMBDAS,
    Fit,
    Walks,
    fit_correction,
    say_if_tokens_are_few,
)


def project_before_runs(pruned: Pruned) -> Compensation:
    """One W' (d, d) for each run."""
    return fit_before_runs(pruned, "left", Walks.start(pruned))


def refit_before_runs(pruned: Pruned) -> Compensation:
    """W_down (d, k) itself for each run: as many more weights to fit as the FFN is wider than the
    hidden state."""
    return fit_before_runs(pruned, "refit", Walks.start(pruned))


def fit_before_runs(pruned: Pruned, kind: str, walks: Walks) -> Compensation:
    """One correction of this kind of Fit for each run of removed layers."""
    say_if_tokens_are_few(pruned, kind)
    so_far = Compensation()
    for run in pruned.runs():
        fit = Fit(*run, kind, weighted=True)
        found = fit_correction(
            pruned, fit, so_far.changes, RELATIVE_LAMBDAS, walks, so_far.held_out_divergence
        )
        so_far = Compensation((*so_far.corrections, found))
    return so_far


SEQUENTIAL = Compensator(
    name="sequential",
    about="folds a W' into the down projection before each cut, in closed form",
    run=project_before_runs,
    linear_output=True,
    by_held_out=True,
    seconds=sequential_seconds,
)
REFIT = Compensator(
    name="refit",
    about="fits the down projection itself before each cut, in closed form",
    run=refit_before_runs,
    linear_output=True,
    by_held_out=True,
    no_experts="A mixture of experts has many down projections, which cannot be refitted",
    seconds=refit_seconds,
)
