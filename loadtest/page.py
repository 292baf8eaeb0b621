"""A load test's report for people (report.html, self-contained; report.md) and for CI
(junit.xml)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
from markupsafe import Markup

from gradmap.common.quoting import markdown, xml_text
from loadtest.figures import Drawing, draw_load_test
from loadtest.records import RequestRecord
from loadtest.table import load_rows, model_lines, noise_line, speed_up_lines

TEMPLATES = Path(__file__).with_name("templates")


def render_template(path: Path, **values: Any) -> str:
    """What the template makes of the values; it may include those beside it and ours. All text is
    escaped; only Markup is not."""
    loader = jinja2.FileSystemLoader([path.parent, TEMPLATES])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    return environment.get_template(path.name).render(**values)


def as_markup(drawings: Sequence[Drawing]) -> list[tuple[Markup, str]]:
    """Figure and caption; the figures are our own drawings."""
    return [(Markup(drawing.svg), drawing.caption) for drawing in drawings]


def render_page(report: Mapping[str, Any], records: Sequence[RequestRecord]) -> str:
    """One page without scripts or outside resources."""
    return render_template(
        TEMPLATES / "loadtest.html.j2",
        report=report,
        rows=load_rows(report),
        lines=speed_up_lines(report),
        noise=noise_line(report),
        figures=as_markup(draw_load_test(report, records)),
    )


def render_summary(report: Mapping[str, Any]) -> str:
    """For a pull request."""
    lines = ["## Load test", ""]
    for arm, compared in report["candidates"].items():
        lines.append(
            f"- {markdown(arm)}: **{compared['verdict']}**: {markdown(compared['reason'])}."
        )
    for line in [*speed_up_lines(report), *model_lines(report)]:
        lines.append(f"- {markdown(line)}")
    lines += ["", *markdown_table(("", *report["arms"]), load_rows(report))]
    noise = noise_line(report)
    if noise is not None:
        lines += ["", f"Noise: {noise}."]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of text; the first column is of names, the others are of numbers."""
    ruler = "|---|" + "---:|" * (len(columns) - 1)
    return [_markdown_row(columns), ruler, *map(_markdown_row, rows)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "".join(f"| {markdown(cell)} " if cell else "| " for cell in cells) + "|"


def render_junit(report: Mapping[str, Any]) -> str:
    """One test case for each candidate. FAIL and INCONCLUSIVE are failures, INVALID is an error."""
    candidates = report["candidates"]
    suite = ElementTree.Element("testsuite", name="gradmap loadtest", tests=str(len(candidates)))
    for arm, compared in candidates.items():
        name = f"{arm} is {report['required_speedup']:g} times as fast as dense"
        case = ElementTree.SubElement(
            suite, "testcase", classname="gradmap.loadtest", name=xml_text(name)
        )
        if compared["verdict"] != "PASS":
            kind = "error" if compared["verdict"] == "INVALID" else "failure"
            ElementTree.SubElement(
                case, kind, type=compared["verdict"], message=xml_text(compared["reason"])
            )
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
