"""The figure of what was removed: scores of what could go, over the sequence of sublayers."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from gradmap.common.colors import PRUNED_COLOR
from gradmap.methods.registry import selector, selector_names
from gradmap.model.sublayers import Pair, Part, Sublayer, sublayers_of
from gradmap.pruning.plan import Plan
from loadtest.drawing import KEPT_COLOR, STYLE, TEXT_COLOR, new_stack, to_svg

# Of a layer's place on the axis: its attention is left of it, and its FFN right.
HALF = 0.25
HEIGHT = 0.8
# Beyond so many layers there is no room for letters and numbers in the cells.
MOST_LAYERS_WITH_TEXT = 48
# Characters of a line beside the upper panel.
LABEL_WIDTH = 28


def draw_removal(plan: Plan) -> str:
    """Bars of the first round's scores, and below them the sublayers: which went as which, and
    which of those that are left are one layer."""
    with mpl.rc_context(STYLE):
        figure, (scores, sequence) = new_stack(width=9.0, height=4.2, shares=(3.0, 1.0))
        _draw_scores(scores, plan)
        _draw_sequence(sequence, plan)
        return to_svg(figure)


def score_label(plan: Plan) -> str:
    """What the scores are, as the selector says. It may be one that is not installed here."""
    name = plan.recipe["selector"]
    return selector(name).score_label if name in selector_names() else "score"


def _place(sublayer: Sublayer) -> float:
    """The middle of its cell."""
    return sublayer.layer + (HALF if sublayer.part is Part.FFN else -HALF)


def _middle(pair: Pair) -> float:
    return (_place(pair.first) + _place(pair.second)) / 2


def _draw_scores(axes: Axes, plan: Plan) -> None:
    scores = plan.steps[0].scores
    width = 0.8 if all(pair.is_layer for pair in scores) else 0.4
    removed = set(plan.removal_order)
    colors = [PRUNED_COLOR if pair in removed else KEPT_COLOR for pair in scores]
    axes.bar([_middle(pair) for pair in scores], list(scores.values()), width, color=colors)
    axes.set_ylabel(fill(f"{score_label(plan)}, first round", LABEL_WIDTH))
    axes.tick_params(labelbottom=False)


def _draw_sequence(axes: Axes, plan: Plan) -> None:
    layers = plan.base_model.layers
    ranks = {
        sublayer: rank for rank, pair in enumerate(plan.removal_order, start=1) for sublayer in pair
    }
    with_text = layers <= MOST_LAYERS_WITH_TEXT
    for sublayer in sublayers_of(range(layers)):
        _draw_cell(axes, sublayer, ranks, with_text)
    for layer in plan.kept_layers:
        if layer.attention != layer.ffn:
            ends = Sublayer(layer.attention, Part.ATTENTION), Sublayer(layer.ffn, Part.FFN)
            axes.plot([_place(end) for end in ends], [-0.25, -0.25], color=TEXT_COLOR, marker="|")
    axes.set_ylim(-0.6, 1)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(
        "attention and FFN of each layer (original number); red: removed, with its place in the "
        "order;\nbracket: what became one layer"
    )


def _draw_cell(
    axes: Axes, sublayer: Sublayer, ranks: Mapping[Sublayer, int], with_text: bool
) -> None:
    rank = ranks.get(sublayer)
    color = KEPT_COLOR if rank is None else PRUNED_COLOR
    place = _place(sublayer)
    axes.add_patch(
        Rectangle((place - HALF, 0), 2 * HALF, HEIGHT, facecolor=color, edgecolor="white")
    )
    if with_text:
        text = str(sublayer)[0] if rank is None else str(rank)
        axes.text(place, HEIGHT / 2, text, ha="center", va="center", fontsize=8)
