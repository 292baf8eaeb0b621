"""The table that `gradmap heal` prints."""

from __future__ import annotations

from collections.abc import Sequence

from gradmap.healing.scaling import Forecast
from gradmap.pruning.plan import HealingRecord


def summarise(healing: HealingRecord, more: Sequence[Forecast]) -> list[tuple[str, str]]:
    """Rows: what, and its value. more: what more tokens would bring."""
    first, last = healing.curve[0], healing.curve[-1]
    best = min(healing.curve, key=lambda point: point.held_out_divergence)
    rows = [
        ("tokens trained on", f"{last.tokens}"),
        ("tokens per second", f"{last.tokens / last.seconds:.0f}"),
        *((f"passes through {text}", f"{passes}") for text, passes in healing.passes.items()),
        (
            "held-out divergence",
            f"{first.held_out_divergence:.4f} -> {best.held_out_divergence:.4f} nats per token",
        ),
        ("best after", f"{best.tokens} tokens"),
    ]
    if best is first:
        rows.append(("corrections", "left out, because they do not help"))
    rows += [(forecast.title, forecast.describe()) for forecast in more]
    return rows
