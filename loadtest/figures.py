"""Figures of a load test, each with what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np

from loadtest.drawing import (
    KEPT_COLOR,
    PRUNED_COLOR,
    STYLE,
    TEXT_COLOR,
    add_legend,
    arm_colors,
    new_figure,
    to_svg,
)
from loadtest.loads import readable
from loadtest.metrics import measure, values_of
from loadtest.records import RequestRecord

PANELS = (("ttft", "TTFT"), ("tpot", "TPOT"))
# Of each arm: a point of a drawing takes some hundred bytes, and no eye tells more apart.
MOST_POINTS = 2000


@dataclass(frozen=True)
class Drawing:
    """svg: markup of our own. caption: text."""

    svg: str
    caption: str


def draw_load_test(report: Mapping[str, Any], records: Sequence[RequestRecord]) -> list[Drawing]:
    """All figures that the loads of this test give."""
    records = [record for record in records if record.pair >= 0]
    drawings = []
    if report["speedup"]:
        caption = (
            "Diamond: geometric mean; bar: 95% interval (Student's t over the log ratios of the "
            "pairs); dots: single pairs of blocks. TTFT and TPOT at the lowest concurrency, "
            "output throughput at the highest."
        )
        drawings.append(Drawing(draw_speed_ups(report), caption))
    loads = list(report["arms"]["dense"])
    arms = list(report["arms"])
    of_load = [record for record in records if record.load == loads[0]]
    caption = (
        f"{_extent(of_load, arms)} at {readable(loads[0])}: the share that was at least as fast."
    )
    drawings.append(Drawing(draw_latency(of_load, arms, loads[0]), caption))
    if len(loads) > 1:
        caption = (
            "Medians of all requests of a load; bars reach to the 95th percentile, where enough "
            "requests tell it."
        )
        drawings.append(Drawing(draw_against_load(report), caption))
        caption = (
            "Each point is a load: tokens that arrived in a second, and how long a token took."
        )
        drawings.append(Drawing(draw_throughput_latency(report), caption))
    if any(
        summary["attainment"] is not None
        for arm in report["arms"].values()
        for summary in arm.values()
    ):
        limits = ", ".join(
            f"{slo['metric'].upper()} ≤ {1000 * slo['limit_s']:g} ms"
            for slo in report["settings"]["slos"]
        )
        drawings.append(
            Drawing(
                draw_attainment(report),
                f"Share of the requests within {limits}; failed ones are not.",
            )
        )
    caption = f"{_extent(records, arms)} when it was sent: drifts, warm-up and outliers would show."
    drawings.append(Drawing(draw_timeline(records, arms), caption))
    return drawings


def _extent(records: Sequence[RequestRecord], arms: Sequence[str]) -> str:
    """What of the requests is drawn, as the beginning of a caption."""
    most = max(sum(record.arm == arm for record in records) for arm in arms)
    return (
        "Every request"
        if most <= MOST_POINTS
        else f"{MOST_POINTS:,} of up to {most:,} requests of a model, evenly"
    )


def thinned(values: Sequence[Any]) -> list[Any]:
    """At most MOST_POINTS of them, the first and the last and evenly between, in their order."""
    if len(values) <= MOST_POINTS:
        return list(values)
    return [
        values[place] for place in np.linspace(0, len(values) - 1, MOST_POINTS).round().astype(int)
    ]


def draw_latency(records: Sequence[RequestRecord], arms: Sequence[str], load: str) -> str:
    """Cumulative distributions of TTFT and TPOT over the requests, which are of one load."""
    measured = {
        arm: [measure(one) for one in records if one.arm == arm and one.error is None]
        for arm in arms
    }
    with mpl.rc_context(STYLE):
        figure, panels = new_figure(width=9.0, panels=2)
        for axes, (metric, name) in zip(panels, PANELS, strict=True):
            for arm, color in arm_colors(arms).items():
                if values := values_of(measured[arm], metric):
                    axes.ecdf(
                        np.array(thinned(sorted(values))) * 1000,
                        color=color,
                        label=arm,
                        linewidth=2,
                    )
            axes.set_xlabel(f"{name} (ms), {readable(load)}")
            axes.set_ylabel("share of requests")
        add_legend(panels[0])
        return to_svg(figure)


def draw_speed_ups(report: Mapping[str, Any]) -> str:
    """Speed-up of each candidate and metric with its interval, every pair of blocks as a dot, and
    what is required."""
    colors = arm_colors(list(report["arms"]))
    rows = [
        (arm, metric, value)
        for arm, compared in report["candidates"].items()
        for metric, value in compared["speedup"].items()
    ]
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(height=1.2 + 0.5 * len(rows))
        for row, (arm, _, value) in enumerate(rows):
            if value["low"] is not None:
                axes.plot(
                    [value["low"], value["high"]],
                    [row, row],
                    color=colors[arm],
                    linewidth=3,
                    alpha=0.6,
                )
            axes.plot(
                value["ratios"], [row] * len(value["ratios"]), "o", color=KEPT_COLOR, markersize=5
            )
            axes.plot([value["value"]], [row], "D", color=colors[arm], markersize=8)
        axes.axvline(1.0, color=TEXT_COLOR, linewidth=1)
        axes.axvline(report["required_speedup"], color=TEXT_COLOR, linewidth=1, linestyle="--")
        axes.set_yticks(
            range(len(rows)), [f"{arm}: {metric.replace('_', ' ')}" for arm, metric, _ in rows]
        )
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.invert_yaxis()
        axes.set_xlabel("speed-up over dense (dashed: required of TPOT)")
        return to_svg(figure)


def draw_against_load(report: Mapping[str, Any]) -> str:
    """TTFT and TPOT of every arm at every load."""
    colors, loads = arm_colors(list(report["arms"])), list(report["arms"]["dense"])
    with mpl.rc_context(STYLE):
        figure, panels = new_figure(width=9.0, panels=2)
        for axes, (metric, name) in zip(panels, PANELS, strict=True):
            for offset, (arm, color) in enumerate(colors.items()):
                described = {load: report["arms"][arm][load][f"{metric}_s"] for load in loads}
                known = {place: each for place, each in enumerate(described.values()) if each}
                places = np.array(list(known)) + 0.12 * (offset - (len(colors) - 1) / 2)
                medians = np.array([each["median"] for each in known.values()]) * 1000
                highs = [each["percentiles"]["p95"] or each["median"] for each in known.values()]
                reach = np.array(highs) * 1000 - medians
                bars = np.stack([np.zeros(len(known)), np.maximum(reach, 0)])
                axes.errorbar(places, medians, bars, marker="o", color=color, capsize=3, label=arm)
            axes.set_xticks(
                range(len(loads)), [readable(load).replace(" ", "\n") for load in loads]
            )
            axes.set_ylabel(f"{name} (ms)")
            axes.set_ylim(bottom=0)
        add_legend(panels[0])
        return to_svg(figure)


def draw_throughput_latency(report: Mapping[str, Any]) -> str:
    """Output throughput against TPOT, one point a load."""
    baseline = next(iter(report["arms"]))
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(width=7.0)
        for arm, color in arm_colors(list(report["arms"])).items():
            known = {
                load: (summary["output_throughput"], 1000 * summary["tpot_s"]["median"])
                for load, summary in report["arms"][arm].items()
                if summary["output_throughput"] and summary["tpot_s"]
            }
            for load, point in known.items() if arm == baseline else ():  # the others stand beneath
                axes.annotate(
                    readable(load), point, xytext=(5, 5), textcoords="offset points", fontsize=8
                )
            points = list(known.values())
            axes.plot([x for x, _ in points], [y for _, y in points], "o", color=color, label=arm)
        axes.set_xlabel("output tokens/s")
        axes.set_ylabel("TPOT median (ms)")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.2)
        add_legend(axes)
        return to_svg(figure)


def draw_attainment(report: Mapping[str, Any]) -> str:
    """Share of requests within the SLOs, for every arm at every load."""
    colors, loads = arm_colors(list(report["arms"])), list(report["arms"]["dense"])
    width = 0.8 / len(colors)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(width=7.0)
        for offset, (arm, color) in enumerate(colors.items()):
            shares = [100 * (report["arms"][arm][load]["attainment"] or 0.0) for load in loads]
            places = np.arange(len(loads)) + width * (offset - (len(colors) - 1) / 2)
            axes.bar_label(
                axes.bar(places, shares, width=width, color=color, label=arm),
                fmt="%.0f",
                fontsize=9,
            )
        axes.set_xticks(range(len(loads)), [readable(load).replace(" ", "\n") for load in loads])
        axes.set_ylabel("requests within the SLOs (%)")
        axes.set_ylim(0, 110)
        add_legend(axes, loc="upper center", ncols=len(colors), bbox_to_anchor=(0.5, 1.15))
        return to_svg(figure)


def draw_timeline(records: Sequence[RequestRecord], arms: Sequence[str]) -> str:
    """TTFT of every request over the time it was sent; failed ones as crosses on the axis."""
    begin_s = min((record.sent_s for record in records), default=0.0)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(width=9.0, height=2.8)
        for arm, color in arm_colors(arms).items():
            own = sorted(
                (record for record in records if record.arm == arm),
                key=lambda record: record.sent_s,
            )
            good = thinned([record for record in own if record.error is None])
            failed = thinned(
                [record.sent_s - begin_s for record in own if record.error is not None]
            )
            times = [record.sent_s - begin_s for record in good]
            axes.plot(
                times,
                [1000 * measure(record).ttft_s for record in good],
                ".",
                color=color,
                label=arm,
            )
            axes.plot(failed, [0.0] * len(failed), "x", color=PRUNED_COLOR)
        axes.set_xlabel("time (s)")
        axes.set_ylabel("TTFT (ms)")
        axes.set_ylim(bottom=0)
        add_legend(axes, loc="lower right", ncols=len(arms), bbox_to_anchor=(1.0, 1.0))
        return to_svg(figure)
