"""Colours of figures: one for the dense model and one for the pruned one, in all of them."""

from __future__ import annotations

DENSE_COLOR, PRUNED_COLOR = "#4c78a8", "#e45756"
# Of several that are compared with the dense model; the first is the pruned one.
CANDIDATE_COLORS = (PRUNED_COLOR, "#f0a030", "#54a24b", "#b279a2", "#9d755d")
