"""The figure of healing: divergence from the dense model over tokens."""

from __future__ import annotations

import matplotlib as mpl

from gradmap.common.colors import PRUNED_COLOR
from gradmap.pruning.plan import HealingRecord
from loadtest.drawing import KEPT_COLOR, STYLE, add_legend, new_figure, to_svg


def draw_healing(healing: HealingRecord) -> str:
    """Held-out divergence at every look, and that on what was trained on since the last one."""
    trained = [
        (point.tokens / 1000, point.training_divergence)
        for point in healing.curve
        if point.training_divergence is not None
    ]
    held_out = [(point.tokens / 1000, point.held_out_divergence) for point in healing.curve]
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        axes.plot(*zip(*held_out, strict=True), marker="o", color=PRUNED_COLOR, label="held out")
        if trained:
            axes.plot(*zip(*trained, strict=True), marker=".", color=KEPT_COLOR, label="training")
        axes.set_xlabel("tokens trained on (thousands)")
        axes.set_ylabel("divergence (nats per token)")
        axes.set_ylim(bottom=0)
        add_legend(axes)
        return to_svg(figure)
