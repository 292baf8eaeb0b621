"""What all figures have in common: SVG text that takes its colour from the page, and one colour for
each arm."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradmap.common.colors import CANDIDATE_COLORS, DENSE_COLOR

# Of what is neither the dense model nor another one.
KEPT_COLOR = "#9aa5b1"
# Drawn in this colour, replaced by the page's own text colour, so that the figure is readable on
# light and dark.
TEXT_COLOR = "#010203"
STYLE: Any = {
    "text.color": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": TEXT_COLOR,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "grid.color": TEXT_COLOR,
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
}


def arm_colors(arms: Sequence[str]) -> dict[str, str]:
    """The first arm is the baseline."""
    return {arms[0]: DENSE_COLOR} | dict(zip(arms[1:], cycle(CANDIDATE_COLORS), strict=False))


def new_figure(width: float = 6.0, height: float = 3.4, panels: int = 1) -> tuple[Figure, Any]:
    """A figure and its axes, several of them if there are several panels. For use within
    `mpl.rc_context(STYLE)`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Axes | np.ndarray[Any, Any] = figure.subplots(1, panels)
    return figure, axes


def new_stack(
    width: float, height: float, shares: Sequence[float]
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """A figure of panels below each other with one horizontal axis, and their axes. shares: of the
    height."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(shares), 1, sharex=True, height_ratios=list(shares))
    return figure, axes


def add_legend(axes: Axes, **options: Any) -> None:
    """Adds a legend, unless there is nothing to tell apart."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **options)


def to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", svg, flags=re.DOTALL).replace(TEXT_COLOR, "currentColor")
