"""Repairs, by name."""

from gradmap.methods.compensation import Compensation, Compensator
from gradmap.methods.distil import distil
from gradmap.methods.gradmap.adam import project_with_adam
from gradmap.methods.gradmap.projection import project_most_drifted
from gradmap.methods.linear_patch import patch_before_runs
from gradmap.methods.merge import merge_by_similarity, merge_where_signs_agree
from gradmap.methods.prune_comp import scale_after_removals
from gradmap.methods.sequential import project_before_runs, refit_before_runs

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
