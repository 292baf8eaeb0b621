"""What all figures have in common: SVG text that takes its colour from the page, and one colour for
each arm."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DENSE_COLOR, PRUNED_COLOR, KEPT_COLOR = "#4c78a8", "#e45756", "#9aa5b1"
_CANDIDATE_COLORS = (PRUNED_COLOR, "#f0a030", "#54a24b", "#b279a2", "#9d755d")
# Drawn in this colour, replaced by the page's own text colour, so that the figure is readable on
# light and dark.
TEXT_COLOR = "#010203"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gradmap",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    **dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        TEXT_COLOR,
    ),
}


def arm_colors(arms: Sequence[str]) -> dict[str, str]:
    """The first arm is the baseline."""
    candidates = {
        arm: _CANDIDATE_COLORS[index % len(_CANDIDATE_COLORS)] for index, arm in enumerate(arms[1:])
    }
    return {arms[0]: DENSE_COLOR, **candidates}


def new_figure(width: float = 6.0, height: float = 3.4, panels: int = 1) -> tuple[Figure, Any]:
    """A figure and its axes, several of them if there are several panels. For use within
    `mpl.rc_context(STYLE)`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Axes | np.ndarray[Any, Any] = figure.subplots(1, panels)
    return figure, axes


def add_legend(axes: Axes, **options: Any) -> None:
    """Unless there is nothing to tell apart."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **options)


def to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", svg, flags=re.DOTALL).replace(TEXT_COLOR, "currentColor")
