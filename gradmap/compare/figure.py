"""The figure of `gradmap compare`: perplexity against layers removed, one line a method, one panel
a text."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from gradmap.common.colors import DENSE_COLOR

# Times the dense perplexity. A method beyond says nothing sensible any more, and would flatten all
# the others.
CEILING = 20.0
MARKERS = "os^Dv"
# Without the first, which is like that of the dense model.
METHOD_COLORS = [colormaps["tab10"](number) for number in range(1, 10)]


def draw_perplexities(result: dict[str, Any]) -> str:
    """The perplexities as an SVG. Error bars are standard errors of the evaluation; the legend's
    order is that of the last points."""
    texts = list(result["dense"]["perplexity"])
    figure = Figure(figsize=(5.0 * len(texts) + 2.5, 5.0), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    methods = _best_first(result["rows"], texts[0])
    for text, axes in zip(texts, panels, strict=True):
        dense = result["dense"]["perplexity"][text]["value"]
        for number, method in enumerate(methods):
            rows = [row for row in result["rows"] if row["method"] == method]
            estimates = [row["perplexity"][text] for row in rows]
            values = [estimate["value"] for estimate in estimates]
            errors = [estimate["stderr"] or 0.0 for estimate in estimates]
            style = {
                "color": METHOD_COLORS[number % len(METHOD_COLORS)],
                "marker": MARKERS[number // len(METHOD_COLORS) % len(MARKERS)],
            }
            axes.errorbar(
                [row["removed"] for row in rows], values, errors, capsize=3, label=method, **style
            )
        axes.axhline(dense, color=DENSE_COLOR, linestyle="--", label="dense")
        axes.set(xlabel="layers removed", ylabel=f"perplexity, {text} (log scale)", yscale="log")
        axes.set_ylim(0.9 * dense, CEILING * dense)
        axes.set_xticks(sorted({row["removed"] for row in result["rows"]}))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def _best_first(rows: list[dict[str, Any]], text: str) -> list[str]:
    """The methods by their perplexity where most layers are removed."""
    last = max(row["removed"] for row in rows)
    at_last = {
        row["method"]: row["perplexity"][text]["value"] for row in rows if row["removed"] == last
    }
    return sorted(at_last, key=at_last.__getitem__)
