"""Repairs, by name."""

from gradmap.compensation import Compensation, Compensator
from gradmap.compensators.adam import project_with_adam
from gradmap.compensators.distil import distil
from gradmap.compensators.projection import project_most_drifted
from gradmap.compensators.sequential import project_before_runs, refit_before_runs

COMPENSATORS: dict[str, Compensator] = {
    "none": lambda pruned: Compensation(),
    "projection": project_most_drifted,
    "projection-adam": project_with_adam,
    "sequential": project_before_runs,
    "refit": refit_before_runs,
    "distil": distil,
}
