"""What people and CI get of a load test: a page, a summary, a JUnit file; and the ideal that it is
compared with."""

import re
from dataclasses import replace
from functools import partial
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file

from gradmap.common.colors import DENSE_COLOR, PRUNED_COLOR
from loadtest import figures as load_figures
from loadtest.conclusions import Facts, SpeedGate, build_report
from loadtest.conversations import RecordCount
from loadtest.figures import MOST_POINTS, draw_latency, draw_timeline, thinned
from loadtest.ideal import WeightBytes, ideal_speed_ups, weight_bytes
from loadtest.loads import ClosedLoop, OpenLoop
from loadtest.page import render_junit, render_page, render_summary
from loadtest.slo import parse_slo
from tests.loadtest.measurements import ONE, SETTINGS, measured, record

EVIL = "<script>alert(1)</script>"
LOADS = (ONE, ClosedLoop(8), OpenLoop("poisson", 2.5))


def make_report(required=1.5, error=None, name="pruned", earlier=None):
    settings = replace(
        SETTINGS,
        dense=EVIL,
        candidates={name: "b", "more": "c"},
        loads=LOADS,
        pairs=6,
        interleaved=True,
        slos=(parse_slo("ttft_p50=100ms"),),
        requests_per_load=2,
        open_loop_s=0.1,
    )
    records = [
        record(
            arm,
            pair,
            load=load.name,
            tpot=tpot * (1 + 0.01 * pair + 0.001 * pair * (arm == "dense")),
            sent=100.0 + pair,
            error=error,
        )
        for pair in range(6)
        for arm, tpot in (("dense", 0.2), (name, 0.1), ("more", 0.19))
        for load in LOADS
        for _ in range(settings.requests_at(load))
    ]
    records += [
        record("dense-again", load=load.name, tpot=0.21)
        for load in LOADS
        for _ in range(settings.requests_at(load))
    ]
    sizes = {"dense": WeightBytes(200, 100), name: WeightBytes(100, 50)}
    facts = Facts({"cpu": EVIL}, sizes, RecordCount(9, 1))
    report = build_report(measured(records), settings, SpeedGate(required, earlier), facts)
    return report, records


def test_the_page_has_every_figure_and_needs_nothing_else():
    report, records = make_report()
    page = render_page(report, records)
    # speed-ups, latency, against load, throughput and latency, attainment, timeline
    assert page.count("<svg") == page.count("<figcaption>") == 6
    assert EVIL not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?https?:|@import|<script|<link", page)
    assert "Speed-up of pruned, TPOT: 2.00x (95% interval" in page
    assert "100% of the ideal 2.00x" in page
    assert "two blocks of the dense model differ by at most" in page


def test_a_test_in_which_everything_failed_has_a_page_too():
    report, records = make_report(error="HTTP 500")
    page = render_page(report, records)
    assert "INVALID" in page
    assert "requests failed (the first: HTTP 500)" in page


def test_the_summary_has_a_verdict_for_each_candidate_and_a_column_for_each_arm():
    summary = render_summary(make_report()[0])
    assert "- pruned: **PASS**" in summary
    assert "- more: **FAIL**" in summary
    assert "| | dense | pruned | more |" in summary
    assert "| poisson 2.5/s: requests within the SLOs (%) | 0.00 | 0.00 | 0.00 |" in summary


def test_a_speed_up_that_is_surely_lower_than_before_fails():
    before, records = make_report()
    speed_up = before["candidates"]["pruned"]["speedup"]["tpot"]
    again, _ = make_report(earlier=before)
    assert again["candidates"]["pruned"]["verdict"] == "PASS"
    assert "(was 2.00x)" in render_page(again, records)
    speed_up |= {"value": 3.0, "low": 2.9, "high": 3.1}
    worse, _ = make_report(earlier=before)
    assert worse["candidates"]["pruned"]["verdict"] == "FAIL"
    reason = worse["candidates"]["pruned"]["reason"]
    assert reason == "less than in the earlier test: TPOT speed-up 2.00x, was 3.00x"


@pytest.mark.parametrize(
    ("error", "kinds"), [(None, [None, "failure"]), ("cut & run", ["error", "error"])]
)
def test_junit_tells_ci_what_passed(error, kinds):
    suite = ElementTree.fromstring(render_junit(make_report(error=error, name="a&b")[0]))
    assert suite.get("tests") == "2"
    assert [case[0].tag if len(case) else None for case in suite] == kinds
    assert suite[0].get("name") == "a&b is 1.5 times as fast as dense"


def test_of_very_many_requests_the_page_draws_some_and_says_so(monkeypatch):
    monkeypatch.setattr(load_figures, "MOST_POINTS", 50)
    report, records = make_report()
    assert "Every request" in render_page(report, records)
    many = [
        record(arm, sent=100.0 + k, ttft=0.1 + 0.001 * k)
        for arm in ("dense", "pruned")
        for k in range(1000)
    ]
    few = [one for one in many if one.sent_s % 20 == 0]  # 50 of each arm
    for draw in (draw_timeline, partial(draw_latency, load=ONE.name)):
        # coordinates have other digits, and nothing else may take more room
        assert len(draw(many, arms=["dense", "pruned"])) < 1.2 * len(
            draw(few, arms=["dense", "pruned"])
        )
    page = render_page(report, many)
    assert page.count("50 of up to 1,000 requests of a model, evenly") == 2
    assert "Every request" not in page


def test_failed_requests_are_drawn_in_the_colour_of_their_model():
    """The legend has a mark of each model in its colour; a failed request is one mark more."""
    good = [record("dense"), record("pruned")]
    failed = [*good, record("dense", error="cut")]
    drawings = [draw_timeline(records, ["dense", "pruned"]) for records in (good, failed)]
    dense, pruned = (
        [svg.count(color) for svg in drawings] for color in (DENSE_COLOR, PRUNED_COLOR)
    )
    assert dense[0] < dense[1] and pruned[0] == pruned[1]


def test_what_is_drawn_of_very_many_reaches_from_the_first_to_the_last():
    values = list(range(10_000))
    drawn = thinned(values)
    assert len(drawn) == MOST_POINTS and drawn == sorted(set(drawn))
    assert (drawn[0], drawn[-1]) == (0, 9999)
    assert thinned(values[:MOST_POINTS]) == values[:MOST_POINTS]


def test_what_servers_say_is_text_everywhere():
    error = "HTTP 400: <b>|[x](http://evil)\x1b[31m @team\x00"
    report, records = make_report(error=error)
    report["settings"]["models"] = {"dense": "a|b\n# c"}
    summary = render_summary(report)
    assert r"\<b\>\|\[x\](http&#58;//evil)\\x1b\[31m &#64;team\\x00" in summary
    assert r"- dense is 'a\|b\\n\# c'" in summary
    assert "\x1b" not in summary and "\x00" not in summary
    (case, _) = ElementTree.fromstring(render_junit(report))
    assert "HTTP 400: <b>|[x](http://evil)\ufffd[31m @team\ufffd" in case[0].get("message")
    assert "<b>" not in render_page(report, records)


@pytest.mark.parametrize("tied", [True, False])
def test_the_ideal_follows_from_what_is_read(picos, tmp_path, tied):
    """Of an untied model, the input embeddings are not read whole."""
    sizes = {}
    for arm, layers in (("dense", 3), ("pruned", 2)):
        directory = tmp_path / arm
        directory.mkdir()
        (directory / "config.json").write_text(
            (picos["llama"].directory / "config.json").read_text()
        )
        tensors = {
            f"model.layers.{index}.mlp.down_proj.weight": torch.zeros(10, 10)
            for index in range(layers)
        }
        tensors |= {
            "model.embed_tokens.weight": torch.zeros(50, 10),
            "model.norm.weight": torch.zeros(10),
        }
        tensors |= {} if tied else {"lm_head.weight": torch.zeros(50, 10)}
        save_file(tensors, directory / "model.safetensors")
        sizes[arm] = weight_bytes(directory)
    assert sizes["dense"] == WeightBytes(layers=4 * 300, head=4 * 510)
    ideal = ideal_speed_ups(sizes, "pruned", "dense")
    assert ideal == {"tpot": pytest.approx(810 / 710), "ttft": pytest.approx(1.5)}
    assert ideal_speed_ups({"dense": sizes["dense"]}, "pruned", "dense") == {}


def test_the_size_of_what_is_no_model_is_not_known(tmp_path):
    assert weight_bytes(tmp_path) is None
