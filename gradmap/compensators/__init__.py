"""Repairs, by name."""

from gradmap.compensation import Compensation, Compensator
from gradmap.compensators.adam import project_with_adam
from gradmap.compensators.distil import distil
from gradmap.compensators.magnitude import scale_after_removals
from gradmap.compensators.merge import merge_by_similarity, merge_where_signs_agree
from gradmap.compensators.patch import patch_before_runs
from gradmap.compensators.projection import project_most_drifted
from gradmap.compensators.sequential import project_before_runs, refit_before_runs

COMPENSATORS: dict[str, Compensator] = {
    "none": lambda pruned: Compensation(),
    "projection": project_most_drifted,
    "projection-adam": project_with_adam,
    "sequential": project_before_runs,
    "refit": refit_before_runs,
    "distil": distil,
    "magnitude": scale_after_removals,
    "mka": merge_by_similarity,
    "gradpruner": merge_where_signs_agree,
    "linear-patch": patch_before_runs,
}
