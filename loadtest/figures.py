"""Figures of a load test, each with what it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from loadtest.cells import grouped
from loadtest.drawing import (
    KEPT_COLOR,
    STYLE,
    TEXT_COLOR,
    add_legend,
    arm_colors,
    new_figure,
    to_svg,
)
from loadtest.loads import load_labels
from loadtest.metrics import (
    ATTAINMENT,
    BY_NAME,
    MAIN,
    OF_REQUESTS,
    OUTPUT_THROUGHPUT,
    TPOT,
    TTFT,
    Metric,
    measure,
)
from loadtest.records import RequestRecord

# What has a panel of its own.
PANELS = tuple(metric for metric in OF_REQUESTS if metric in MAIN)
# Of each arm: a point of a drawing takes some hundred bytes, and no eye tells more apart.
MOST_POINTS = 2000

SPEED_UPS = (
    "Diamond: geometric mean; bar: 95% interval (Student's t over the log ratios of the pairs); "
    "dots: single pairs of blocks. Latencies at the lowest concurrency, throughput at the highest."
)
AGAINST_LOAD = (
    "Medians of all requests of a load; bars reach to the 95th percentile, where enough requests "
    "tell it."
)
THROUGHPUT_LATENCY = (
    "Each point is a load: tokens that arrived in a second, and how long a token took."
)


@dataclass(frozen=True)
class Drawing:
    """svg: markup of our own. caption: text."""

    svg: str
    caption: str


def draw_load_test(report: Mapping[str, Any], records: Sequence[RequestRecord]) -> list[Drawing]:
    """All figures that the loads of this test give."""
    return list(_drawings(report, [record for record in records if record.pair >= 0]))


def _drawings(report: Mapping[str, Any], records: Sequence[RequestRecord]) -> Iterator[Drawing]:
    arms, labels = list(report["arms"]), load_labels(report)
    if report["speedup"]:
        yield Drawing(draw_speed_ups(report), SPEED_UPS)
    first, label = next(iter(labels.items()))
    of_load = [record for record in records if record.load == first]
    caption = f"{_extent(of_load, arms)} at {label}: the share that was at least as fast."
    yield Drawing(draw_latency(of_load, arms, label), caption)
    if len(labels) > 1:
        yield Drawing(draw_against_load(report), AGAINST_LOAD)
        yield Drawing(draw_throughput_latency(report), THROUGHPUT_LATENCY)
    if _tells_attainment(report):
        limits = ", ".join(map(_describe_limit, report["settings"]["slos"]))
        caption = f"Share of the requests within {limits}; failed ones are not."
        yield Drawing(draw_attainment(report), caption)
    caption = f"{_extent(records, arms)} when it was sent: drifts, warm-up and outliers would show."
    yield Drawing(draw_timeline(records, arms), caption)


def _tells_attainment(report: Mapping[str, Any]) -> bool:
    summaries = [summary for loads in report["arms"].values() for summary in loads.values()]
    return any(summary[ATTAINMENT.key] is not None for summary in summaries)


def _describe_limit(slo: Mapping[str, Any]) -> str:
    metric = BY_NAME[slo["metric"]]
    return f"{metric.label} ≤ {metric.factor * slo['limit_s']:g} {metric.unit}"


def _extent(records: Sequence[RequestRecord], arms: Sequence[str]) -> str:
    """What of the requests is drawn, as the beginning of a caption."""
    of_arms = grouped(records, lambda record: record.arm)
    most = max(len(of_arms.get(arm, ())) for arm in arms)
    if most <= MOST_POINTS:
        return "Every request"
    return f"{MOST_POINTS:,} of up to {most:,} requests of a model, evenly"


def thinned(values: Sequence[Any]) -> list[Any]:
    """At most MOST_POINTS of them, the first and the last and evenly between, in their order."""
    if len(values) <= MOST_POINTS:
        return list(values)
    places = np.linspace(0, len(values) - 1, MOST_POINTS).round().astype(int)
    return [values[place] for place in places]


def draw_latency(records: Sequence[RequestRecord], arms: Sequence[str], load: str) -> str:
    """Cumulative distributions of PANELS over the requests, which are of one load. load: its
    label."""
    good = [record for record in records if record.error is None]
    of_arms = grouped(good, lambda record: record.arm)
    with mpl.rc_context(STYLE):
        figure, panels = new_figure(width=9.0, panels=len(PANELS))
        for axes, metric in zip(panels, PANELS, strict=True):
            for arm, color in arm_colors(arms).items():
                values = metric.values([measure(record) for record in of_arms.get(arm, ())])
                if values:
                    drawn = np.array(thinned(sorted(values))) * metric.factor
                    axes.ecdf(drawn, color=color, label=arm, linewidth=2)
            axes.set_xlabel(f"{metric.label} ({metric.unit}), {load}")
            axes.set_ylabel("share of requests")
        add_legend(panels[0])
        return to_svg(figure)


def draw_speed_ups(report: Mapping[str, Any]) -> str:
    """Speed-up of each candidate and metric with its interval, every pair of blocks as a dot, and
    what is required."""
    colors, bars = arm_colors(list(report["arms"])), []
    for arm, compared in report["candidates"].items():
        for name, value in compared["speedup"].items():
            bars.append((f"{arm}: {BY_NAME[name].label}", value, colors[arm]))
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(height=1.2 + 0.5 * len(bars))
        for row, (_, value, color) in enumerate(bars):
            _draw_speed_up(axes, row, value, color)
        axes.axvline(1.0, color=TEXT_COLOR, linewidth=1)
        axes.axvline(report["required_speedup"], color=TEXT_COLOR, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
        axes.set_ylim(-0.6, len(bars) - 0.4)
        axes.invert_yaxis()
        axes.set_xlabel("speed-up over dense (dashed: required of TPOT)")
        return to_svg(figure)


def _draw_speed_up(axes: Axes, row: int, value: Mapping[str, Any], color: str) -> None:
    if value["low"] is not None:
        interval = (value["low"], value["high"])
        axes.plot(interval, (row, row), color=color, linewidth=3, alpha=0.6)
    ratios = value["ratios"]
    axes.plot(ratios, [row] * len(ratios), "o", color=KEPT_COLOR, markersize=5)
    axes.plot([value["value"]], [row], "D", color=color, markersize=8)


def draw_against_load(report: Mapping[str, Any]) -> str:
    """PANELS of every arm at every load."""
    colors, labels = arm_colors(list(report["arms"])), load_labels(report)
    with mpl.rc_context(STYLE):
        figure, panels = new_figure(width=9.0, panels=len(PANELS))
        for axes, metric in zip(panels, PANELS, strict=True):
            for number, (arm, color) in enumerate(colors.items()):
                offset = 0.12 * (number - (len(colors) - 1) / 2)
                described = [report["arms"][arm][load][metric.key] for load in labels]
                bars = _draw_medians(axes, metric, described, offset, color)
                bars.set_label(arm)
            axes.set_xticks(range(len(labels)), _on_two_lines(labels))
            axes.set_ylabel(f"{metric.label} ({metric.unit})")
            axes.set_ylim(bottom=0)
        add_legend(panels[0])
        return to_svg(figure)


def _draw_medians(
    axes: Axes,
    metric: Metric,
    described: Sequence[Mapping[str, Any] | None],
    offset: float,
    color: str,
) -> Any:
    """described: a distribution for each place; None where there is none."""
    known = {place: values for place, values in enumerate(described) if values}
    medians = np.array([values["median"] for values in known.values()]) * metric.factor
    highs = [values["percentiles"]["p95"] or values["median"] for values in known.values()]
    reach = np.maximum(np.array(highs) * metric.factor - medians, 0)
    bars = np.stack([np.zeros(len(known)), reach])
    places = np.array(list(known)) + offset
    return axes.errorbar(places, medians, bars, marker="o", capsize=3, color=color)


def draw_throughput_latency(report: Mapping[str, Any]) -> str:
    """Output throughput against TPOT, one point a load."""
    baseline, labels = next(iter(report["arms"])), load_labels(report)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(width=7.0)
        for arm, color in arm_colors(list(report["arms"])).items():
            points = _throughput_and_latency(report["arms"][arm])
            for load, point in points.items():
                if arm == baseline:  # the others stand beneath
                    apart = {"xytext": (5, 5), "textcoords": "offset points"}
                    axes.annotate(labels[load], point, fontsize=8, **apart)
            rates, times = ([point[axis] for point in points.values()] for axis in (0, 1))
            axes.plot(rates, times, "o", color=color, label=arm)
        axes.set_xlabel(OUTPUT_THROUGHPUT.title)
        axes.set_ylabel(TPOT.title)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.2)
        add_legend(axes)
        return to_svg(figure)


def _throughput_and_latency(
    summaries: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[float, float]]:
    """Load -> output throughput and the median of TPOT, where both are known."""
    points = {}
    for load, summary in summaries.items():
        rate, time_s = summary[OUTPUT_THROUGHPUT.key], summary[TPOT.key]
        if rate and time_s:
            points[load] = (rate, TPOT.factor * time_s["median"])
    return points


def draw_attainment(report: Mapping[str, Any]) -> str:
    """Share of requests within the SLOs, for every arm at every load."""
    colors, labels = arm_colors(list(report["arms"])), load_labels(report)
    width = 0.8 / len(colors)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(width=7.0)
        for number, (arm, color) in enumerate(colors.items()):
            summaries = [report["arms"][arm][load] for load in labels]
            shares = [ATTAINMENT.factor * (summary[ATTAINMENT.key] or 0.0) for summary in summaries]
            places = np.arange(len(labels)) + width * (number - (len(colors) - 1) / 2)
            bars = axes.bar(places, shares, width=width, color=color, label=arm)
            axes.bar_label(bars, fmt="%.0f", fontsize=9)
        axes.set_xticks(range(len(labels)), _on_two_lines(labels))
        axes.set_ylabel(ATTAINMENT.title)
        axes.set_ylim(0, 110)
        add_legend(axes, loc="upper center", ncols=len(colors), bbox_to_anchor=(0.5, 1.15))
        return to_svg(figure)


def _on_two_lines(labels: Mapping[str, str]) -> list[str]:
    return [label.replace(" ", "\n") for label in labels.values()]


def draw_timeline(records: Sequence[RequestRecord], arms: Sequence[str]) -> str:
    """TTFT of every request over the time it was sent; failed ones as crosses on the axis."""
    begin_s = min((record.sent_s for record in records), default=0.0)
    of_arms = grouped(sorted(records, key=lambda record: record.sent_s), lambda record: record.arm)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(width=9.0, height=2.8)
        for arm, color in arm_colors(arms).items():
            own = of_arms.get(arm, [])
            good = thinned([record for record in own if record.error is None])
            failed = thinned([record for record in own if record.error is not None])
            values = TTFT.factor * np.array([measure(record).ttft_s for record in good])
            axes.plot(_seconds_since(begin_s, good), values, ".", color=color, label=arm)
            axes.plot(_seconds_since(begin_s, failed), [0.0] * len(failed), "x", color=color)
        axes.set_xlabel("time (s)")
        axes.set_ylabel(f"{TTFT.label} ({TTFT.unit})")
        axes.set_ylim(bottom=0)
        add_legend(axes, loc="lower right", ncols=len(arms), bbox_to_anchor=(1.0, 1.0))
        return to_svg(figure)


def _seconds_since(begin_s: float, records: Sequence[RequestRecord]) -> list[float]:
    return [record.sent_s - begin_s for record in records]
