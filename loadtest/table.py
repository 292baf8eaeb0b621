"""The numbers of a load test as rows of a table, for the terminal, a pull request and a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadtest.loads import readable

# What is shown of a load, with the factor to its unit.
SHOWN = (
    ("ttft_s", "TTFT median (ms)", 1e3),
    ("tpot_s", "TPOT median (ms)", 1e3),
    ("itl_s", "ITL median (ms)", 1e3),
    ("e2el_s", "E2EL median (ms)", 1e3),
    ("output_throughput", "output tokens/s", 1.0),
    ("goodput", "goodput (requests/s)", 1.0),
    ("attainment", "requests within the SLOs (%)", 1e2),
)


# The same of the machine's use.
SHOWN_USE = (
    ("cpu", "processors busy (%)", 1e2),
    ("memory_bytes", "memory in use (GB)", 1e-9),
    ("gpu", "GPU busy (%)", 1e2),
    ("gpu_memory_bytes", "GPU memory (GB)", 1e-9),
    ("gpu_power_w", "GPU power (W)", 1.0),
    ("gpu_clock_mhz", "GPU clock (MHz)", 1.0),
    ("throttled", "GPU throttled (% of the time)", 1e2),
    ("energy_per_token_j", "GPU energy per token (J)", 1.0),
)


def load_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What is measured, and a value for every arm."""
    arms = report["arms"]
    rows = []
    for load in next(iter(arms.values())):
        shown = [
            (unit, [_shown(part.get(name), factor) for part in parts])
            for parts, quantities in (
                ([arm[load] for arm in arms.values()], SHOWN),
                ([arm[load]["resources"] or {} for arm in arms.values()], SHOWN_USE),
            )
            for name, unit, factor in quantities
        ]
        rows += [(f"{readable(load)}: {unit}", *values) for unit, values in shown if any(values)]
    return rows


def speed_up_lines(report: Mapping[str, Any]) -> list[str]:
    """One sentence for every candidate and metric, and one for the highest rates."""
    lines = []
    for arm, compared in report["candidates"].items():
        for metric, value in compared["speedup"].items():
            spread = (
                ""
                if value["low"] is None
                else f" (95% interval {value['low']:.2f}-{value['high']:.2f})"
            )
            ideal = compared["ideal"].get(metric)
            share = (
                ""
                if ideal is None
                else f", {100 * ideal['fraction']:.0f}% of the ideal {ideal['value']:.2f}x"
            )
            before = compared["before"].get(metric)
            change = "" if before is None else f" (was {before['value']:.2f}x)"
            lines.append(
                f"speed-up of {arm}, {metric.replace('_', ' ')}: "
                f"{value['value']:.2f}x{spread}{share}{change}"
            )
    return [*lines, *filter(None, [rate_line(report)])]


def rate_line(report: Mapping[str, Any]) -> str | None:
    """The highest rates that meet the SLOs; None if they were not looked for."""
    rates = [f"{arm} {rate:g}/s" for arm, rate in report["highest_rate"].items()]
    return f"highest rate that meets the SLOs: {', '.join(rates)}" if rates else None


def model_lines(report: Mapping[str, Any]) -> list[str]:
    """Of every arm that was a URL, which of its models was asked."""
    return [f"{arm} is {model!r}" for arm, model in report["settings"]["models"].items()]


def noise_line(report: Mapping[str, Any]) -> str | None:
    """What two blocks of the same model differ by; None if that was not measured."""
    noise = [abs(value - 1) for of_load in report["noise"].values() for value in of_load.values()]
    return (
        f"two blocks of the dense model differ by at most {100 * max(noise):.1f}%"
        if noise
        else None
    )


def _shown(value: Any, factor: float) -> str:
    """A distribution by its median, a number by itself."""
    if value is None:
        return ""
    return f"{factor * (value['median'] if isinstance(value, dict) else value):.2f}"
