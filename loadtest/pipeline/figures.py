"""Figures of what pruning did to quality: perplexity, accuracy."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np

from gradmap.common.colors import DENSE_COLOR, PRUNED_COLOR
from gradmap.evaluation.perplexity import Estimate
from gradmap.evaluation.result import Accuracy
from loadtest.drawing import STYLE, TEXT_COLOR, new_figure, to_svg
from loadtest.pipeline.result import Result, Side

_ARM_COLORS = {"dense": DENSE_COLOR, "pruned": PRUNED_COLOR}


def draw_perplexity(result: Result) -> str:
    """Bars of perplexity per text, dense beside pruned, with standard errors."""
    estimates = {"dense": result.dense.perplexity, "pruned": result.pruned.perplexity}
    return _draw_estimates(estimates, "perplexity (lower is better)", factor=1, width=6.0)


def draw_accuracy(result: Result) -> str:
    """Bars of accuracy per task and of their average, dense beside pruned, with standard errors."""
    estimates = {"dense": _accuracies(result.dense), "pruned": _accuracies(result.pruned)}
    return _draw_estimates(estimates, "accuracy (%, higher is better)", factor=100, width=9.0)


def _accuracies(side: Side) -> dict[str, Accuracy | Estimate]:
    assert side.average_accuracy is not None  # where there are tasks
    return {**side.accuracy, "average": side.average_accuracy}


def _draw_estimates(
    estimates: Mapping[str, Mapping[str, Accuracy | Estimate]],
    label: str,
    factor: float,
    width: float,
) -> str:
    """estimates: arm -> name -> value and standard error."""
    names = list(estimates["dense"])
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(width)
        for offset, (arm, color) in zip((-0.2, 0.2), _ARM_COLORS.items(), strict=True):
            values = [factor * estimates[arm][name].value for name in names]
            errors = [factor * (estimates[arm][name].stderr or 0.0) for name in names]
            places = np.arange(len(names)) + offset
            bars = axes.bar(
                places, values, width=0.38, yerr=errors, color=color, ecolor=TEXT_COLOR, label=arm
            )
            axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=9)
        axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
        axes.set_ylabel(label)
        axes.margins(y=0.15)
        axes.legend(frameon=False, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.15))
        return to_svg(figure)
