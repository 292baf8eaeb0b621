"""The report's figures, as SVG text that takes its text colour from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradmap.plan import Plan
from loadtest.metrics import measure
from loadtest.records import RequestRecord

DENSE_COLOR, PRUNED_COLOR, KEPT_COLOR = "#4c78a8", "#e45756", "#9aa5b1"
_ARM_COLORS = {"dense": DENSE_COLOR, "pruned": PRUNED_COLOR}
# Drawn in this colour, replaced by the page's own text colour, so that the figure is readable on light and dark.
_TEXT_COLOR = "#010203"
_STYLE: Any = {
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
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _TEXT_COLOR
    ),
}


# What the selectors measure; the lowest goes.
SCORES = {
    "repair": "loss that removal adds after repair (nats/token)",
    "gradient": "gradient norm (Eq. 7)",
    "block-influence": "block influence",
    "sleb": "loss without the layer (nats/token)",
}


def draw_importance(plan: Plan) -> str:
    """Bars of the first round's scores, with the order of removal over the removed layers."""
    scores = plan.steps[0].scores
    with mpl.rc_context(_STYLE):
        figure, axes = _new_figure(width=9.0)
        colors = [PRUNED_COLOR if layer in plan.removal_order else KEPT_COLOR for layer in scores]
        axes.bar(list(scores), list(scores.values()), color=colors)
        for rank, layer in enumerate(plan.removal_order, start=1):
            axes.annotate(f"{rank}.", (layer, scores[layer]), ha="center", va="bottom", fontsize=9)
        axes.set_xlabel("layer (original index); red: removed, with its place in the order of removal")
        axes.set_ylabel(f"{SCORES.get(plan.recipe['selector'], 'score')}, first round")
        return _to_svg(figure)


def draw_perplexity(result: dict[str, Any]) -> str:
    """Bars of perplexity per text, dense beside pruned, with standard errors."""
    estimates = {arm: result[arm]["perplexity"] for arm in _ARM_COLORS}
    return _draw_estimates(estimates, "perplexity (lower is better)", factor=1, width=6.0)


def draw_accuracy(result: dict[str, Any]) -> str:
    """Bars of accuracy per task and of their average, dense beside pruned, with standard errors."""
    estimates = {arm: result[arm]["accuracy"] | {"average": result[arm]["average_accuracy"]} for arm in _ARM_COLORS}
    return _draw_estimates(estimates, "accuracy (%, higher is better)", factor=100, width=9.0)


def _draw_estimates(estimates: dict[str, dict[str, Any]], label: str, factor: float, width: float) -> str:
    """estimates: arm -> name -> value and standard error."""
    names = list(estimates["dense"])
    with mpl.rc_context(_STYLE):
        figure, axes = _new_figure(width)
        for offset, (arm, color) in zip((-0.2, 0.2), _ARM_COLORS.items(), strict=True):
            values = [factor * estimates[arm][name]["value"] for name in names]
            errors = [factor * estimates[arm][name]["stderr"] for name in names]
            places = np.arange(len(names)) + offset
            bars = axes.bar(places, values, width=0.38, yerr=errors, color=color, ecolor=_TEXT_COLOR, label=arm)
            axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=9)
        axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
        axes.set_ylabel(label)
        axes.margins(y=0.15)
        axes.legend(frameon=False, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.15))
        return _to_svg(figure)


def draw_latency(records: Sequence[RequestRecord], load: str) -> str:
    """Cumulative distributions of TTFT and TPOT over the requests at one load."""
    measured = {
        arm: [
            measure(record) for record in records if record.error is None and (record.arm, record.load) == (arm, load)
        ]
        for arm in _ARM_COLORS
    }
    with mpl.rc_context(_STYLE):
        figure, panels = _new_figure(width=9.0, panels=2)
        for axes, name, values in (
            (panels[0], "TTFT", {arm: [one.ttft_s for one in ones] for arm, ones in measured.items()}),
            (panels[1], "TPOT", {arm: [one.tpot_s for one in ones if one.tpot_s] for arm, ones in measured.items()}),
        ):
            for arm, color in _ARM_COLORS.items():
                if values[arm]:
                    axes.ecdf(np.array(values[arm]) * 1000, color=color, label=arm, linewidth=2)
            axes.set_xlabel(f"{name} (ms), {load.replace('_', ' ')}")
            axes.set_ylabel("share of requests")
        panels[0].legend(frameon=False)
        return _to_svg(figure)


def draw_speed_ups(report: dict[str, Any]) -> str:
    """Speed-up of each metric with its interval, every pair of blocks as a dot, and the required value."""
    names = list(report["speedup"])
    with mpl.rc_context(_STYLE):
        figure, axes = _new_figure(height=2.6)
        for row, name in enumerate(names):
            value = report["speedup"][name]
            if value["low"] is not None:
                axes.plot([value["low"], value["high"]], [row, row], color=PRUNED_COLOR, linewidth=3, alpha=0.6)
            axes.plot(value["ratios"], [row] * len(value["ratios"]), "o", color=KEPT_COLOR, markersize=5)
            axes.plot([value["value"]], [row], "D", color=PRUNED_COLOR, markersize=8)
        axes.axvline(1.0, color=_TEXT_COLOR, linewidth=1)
        axes.axvline(report["required_speedup"], color=_TEXT_COLOR, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.invert_yaxis()
        axes.set_xlabel("speed-up of pruned over dense (dashed: required of TPOT)")
        return _to_svg(figure)


def _new_figure(width: float = 6.0, height: float = 3.4, panels: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Axes | np.ndarray[Any, Any] = figure.subplots(1, panels)
    return figure, axes


def _to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", svg, flags=re.DOTALL).replace(_TEXT_COLOR, "currentColor")
