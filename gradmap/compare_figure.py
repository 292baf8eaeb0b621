"""The figure of `gradmap compare`: perplexity against layers removed, one line a method, one panel a text."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure


def draw_perplexities(result: dict[str, Any]) -> str:
    """SVG. Error bars are standard errors of the evaluation."""
    texts = list(result["dense"]["perplexity"])
    figure = Figure(figsize=(6.0 * len(texts), 4.5), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for text, axes in zip(texts, panels, strict=True):
        for method in dict.fromkeys(row["method"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["method"] == method]
            estimates = [row["perplexity"][text] for row in rows]
            values, errors = ([estimate[key] for estimate in estimates] for key in ("value", "stderr"))
            axes.errorbar([row["removed"] for row in rows], values, errors, marker="o", capsize=3, label=method)
        axes.axhline(result["dense"]["perplexity"][text]["value"], color="grey", linestyle="--", label="dense")
        axes.set(xlabel="layers removed", ylabel=f"perplexity, {text} (log scale)", yscale="log")
        axes.legend(fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()
