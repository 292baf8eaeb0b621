"""Repairs on either side of where something was cut, front to back.

The last linear map before each run of removed sublayers is fitted so that the hidden state is what
it was behind the run in the dense model. The first FFN behind it, which reads something else than
it did, is fitted to give what it gave. Later fits see what earlier corrections did.
"""

from __future__ import annotations

from gradmap.costs.timing import refit_seconds, sequential_seconds
from gradmap.methods.base import Compensator
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.features import Fit, Walks
from gradmap.methods.ridge import fit_correction, say_if_tokens_are_few
from gradmap.model.sublayers import Part, Sublayer


def project_around_runs(pruned: Pruned) -> Compensation:
    """A W' (d, d) on either side of each run."""
    return fit_around_runs(pruned, "left", Walks.start(pruned))


def refit_around_runs(pruned: Pruned) -> Compensation:
    """The maps themselves on either side of each run, W_down (d, k) or the attention's output
    projection: W_down has as many more weights to fit as the FFN is wider than the hidden state."""
    return fit_around_runs(pruned, "refit", Walks.start(pruned))


def fit_around_runs(pruned: Pruned, kind: str, walks: Walks) -> Compensation:
    """A correction of this kind of Fit on either side of each run."""
    say_if_tokens_are_few(pruned, kind)
    so_far = Compensation()
    for sublayer, goal in sorted(goals_around_runs(pruned).items()):
        fit = Fit(sublayer, goal, kind, weighted=True)
        found = fit_correction(
            pruned, fit, so_far.changes, walks=walks, before=so_far.held_out_divergence
        )
        so_far = Compensation((*so_far.corrections, *found))
    return so_far


def goals_around_runs(pruned: Pruned) -> dict[Sublayer, Sublayer]:
    """Behind which sublayer the hidden state is to be the dense model's, for each that is fitted.

    An FFN between two runs makes up for the second one.
    """
    goals = {run.before: run.last for run in pruned.runs()}
    for run in pruned.runs():
        behind = [kept for kept in pruned.kept if kept > run.last and kept.part is Part.FFN]
        if behind:
            goals.setdefault(behind[0], behind[0])
    return goals


SEQUENTIAL = Compensator(
    name="sequential",
    about="folds a W' into the linear map before each cut and the FFN behind it, in closed form",
    paper="ours, after ReplaceMe (arXiv 2505.02819)",
    run=project_around_runs,
    linear_output=True,
    fits_norms=True,
    by_held_out=True,
    seconds=sequential_seconds,
)
REFIT = Compensator(
    name="refit",
    about="fits the linear map before each cut and the FFN behind it, in closed form",
    run=refit_around_runs,
    linear_output=True,
    fits_norms=True,
    by_held_out=True,
    no_experts="A mixture of experts has many down projections, which cannot be refitted",
    seconds=refit_seconds,
)
