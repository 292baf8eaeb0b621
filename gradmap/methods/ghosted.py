"""Ghosted Layers (Yun et al. 2026, arXiv 2605.15491): the hidden state before a cut passes the
linear map that takes it nearest to what it was behind the removed layers.

W = I + M with (X^T X + 1e-6 I) M = X^T Delta, of all tokens X (n, d), the hidden state at the cut,
and Delta, what the removed layers added to it. Like LinearPatch's it acts on the hidden state
itself, which no stock layer can hold, so that a plan with it can be evaluated in memory, and not
exported.
"""

from __future__ import annotations

from gradmap.costs.timing import ghosted_seconds
from gradmap.methods.base import Compensator
from gradmap.methods.compensation import Compensation, Correction, Pruned, Run, correct_in_turn
from gradmap.methods.features import Fit, Walks
from gradmap.methods.linear_patch import PATCHES_STATES
from gradmap.methods.ridge import fitted_matrix
from gradmap.model.corrections import HIDDEN_STATE, Changes, Place

LAMBDA = 1e-6


def map_before_runs(pruned: Pruned) -> Compensation:
    """One W behind the retained layer before each run of removed layers, front to back."""
    walks = Walks.start(pruned)

    def correct(run: Run, changes: Changes) -> tuple[Correction, ...]:
        fit = Fit(run.before, run.last, "state", exact=True)
        matrix = fitted_matrix(pruned, fit, changes, LAMBDA, walks)
        return pruned.judge([(Place(run.before.layer, HIDDEN_STATE), matrix)], changes)

    return Compensation(correct_in_turn(pruned.runs(), correct))


COMPENSATOR = Compensator(
    name="ghosted",
    about="maps the hidden state before a cut to what it was behind it; cannot be exported",
    paper="Ghosted Layers (arXiv 2605.15491)",
    run=map_before_runs,
    whole_layers=PATCHES_STATES,
    seconds=ghosted_seconds,
)
