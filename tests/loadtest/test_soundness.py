"""What is no evidence gives no verdict: numbers that are none, what is missing, tokens that were
held back."""

import json
import math
from dataclasses import replace

import pytest
from pydantic import ValidationError

from gradmap.common.errors import UserError
from gradmap.common.verdict import Verdict
from loadtest.conclusions import SpeedGate, build_report
from loadtest.metrics import measure
from loadtest.outcome import read_report
from loadtest.records import (
    RECORDS_FILE,
    BlockRecord,
    Measurements,
    RequestRecord,
    ResourceSample,
    append_measurements,
    read_measurements,
    start_files,
    to_json_line,
)
from loadtest.slo import parse_slo
from loadtest.soundness import BURST_S
from loadtest.statistics import SpeedUp, judge
from loadtest.summaries import summarise_load
from tests.loadtest.measurements import FACTS, ONE, SETTINGS, measured, record, report_of, sample


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_passes_nothing(number):
    ratios, good = (1.3,) * 6, {"value": 1.3, "low": 1.2, "high": 1.4}
    for name in good:
        assert (
            judge(SpeedUp(**good | {name: number}, ratios=ratios), 1.0).verdict is Verdict.INVALID
        )
    with pytest.raises(UserError, match=r"--require-speedup is .*; give a finite number above 0"):
        SpeedGate(number)
    for name in ("sent_s", "ended_s", "scheduled_s"):
        with pytest.raises(ValidationError):
            RequestRecord(**record().model_dump() | {name: number})
    with pytest.raises(ValidationError):
        RequestRecord(
            **record().model_dump() | {"chunk_times_s": (100.5, 100.6, number, 100.8, 100.9)}
        )
    with pytest.raises(ValidationError):
        BlockRecord(arm="dense", pair=0, load=ONE.name, client_cpu=number, server_tokens=None)
    with pytest.raises(ValidationError):
        ResourceSample(**sample(1.0).model_dump() | {"cpu": number})


@pytest.mark.parametrize("required", [0.0, -1.0])
def test_a_speed_up_that_nothing_misses_is_not_required(required):
    with pytest.raises(UserError, match="give a finite number above 0"):
        SpeedGate(required)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sent_s": 100.6}, "times are not in their order"),
        ({"scheduled_s": 100.1}, "times are not in their order"),
        ({"ended_s": 100.8}, "times are not in their order"),
        ({"chunk_times_s": (100.5, 100.7, 100.6, 100.8, 100.9)}, "times are not in their order"),
        ({"chunk_times_s": (100.5, 100.6)}, "another number of chunks"),
        ({"chunk_tokens": (1, 2, 2, 4, 5)}, "bring no tokens"),
        ({"chunk_tokens": (0, 1, 2, 3, 5)}, "bring no tokens"),
        ({"chunk_tokens": (1, 2, 3, 4, 6)}, "another count of tokens"),
        ({"completion_tokens": 4}, "not the tokens that were asked for"),
        ({"chunk_tokens": (), "chunk_times_s": ()}, "not the tokens that were asked for"),
        ({"completion_tokens": -1}, "greater than or equal to 0"),
    ],
)
def test_a_record_of_what_cannot_have_happened_is_refused_at_its_line(tmp_path, changes, message):
    good = Measurements((record(),))
    start_files(tmp_path)
    append_measurements(tmp_path, good)
    assert read_measurements(tmp_path) == good
    line = json.dumps(record().model_dump() | changes)
    (tmp_path / RECORDS_FILE).write_text(to_json_line(record()) + line + "\n")
    with pytest.raises(UserError, match=f"line 2 is no RequestRecord: .*{message}"):
        read_measurements(tmp_path)


def test_separators_of_lines_inside_of_a_record_do_not_end_it(tmp_path):
    odd = Measurements((record(error="a\u2028b\u2029c\x85d\x0be\x1cf"), record()))
    start_files(tmp_path)
    append_measurements(tmp_path, odd)
    assert len((tmp_path / RECORDS_FILE).read_text().splitlines()) == 2
    assert read_measurements(tmp_path) == odd
    by_another_program = [
        json.dumps(one.model_dump(), ensure_ascii=False) + "\n" for one in odd.requests
    ]
    (tmp_path / RECORDS_FILE).write_text("".join(by_another_program))
    assert read_measurements(tmp_path) == odd


def test_nothing_is_concluded_where_something_is_missing_or_too_much():
    good = [record(arm) for arm in ("dense", "pruned") for _ in range(2)]
    assert report_of(good)["verdict"] == "INCONCLUSIVE"
    another_arm, another_pair = (
        [*good[:-1], record(*place)] for place in (("dense",), ("pruned", 1))
    )
    for records in (another_arm, another_pair, [*good, good[0]], []):
        report = report_of(records)
        assert (report["verdict"], report["speedup"]) == ("INVALID", {})
    assert (
        report_of(another_arm)["reason"]
        == "3 of 2 requests were recorded in dense, pair 1, concurrency_1"
    )


def test_nothing_is_concluded_where_the_load_generator_left_no_account():
    records = [record(arm) for arm in ("dense", "pruned") for _ in range(2)]
    report = build_report(
        Measurements(tuple(records), measured(records).blocks[:1]), SETTINGS, SpeedGate(1.0), FACTS
    )
    assert report["verdict"] == "INVALID"
    assert (
        report["reason"]
        == "how busy the load generator was is not recorded in pruned, pair 1, concurrency_1"
    )


def six_pairs(ttft=0.1, tpot=0.1):
    """Dense has 0.1 s to the first of five tokens and 0.2 s to each other one; blocks scatter a
    little."""
    records = [
        record(arm, pair, ttft=to_first, tpot=to_next + 0.0001 * pair)
        for pair in range(6)
        for arm, to_first, to_next in (("dense", 0.1, 0.2), ("pruned", ttft, tpot))
        for _ in range(2)
    ]
    return records, replace(SETTINGS, pairs=6)


@pytest.mark.parametrize("arm", ["dense", "pruned"])
def test_tokens_that_arrive_in_a_burst_are_no_speed_up(arm):
    """A proxy that buffers: all four tokens after the first follow it at once, whichever arm it
    stands before."""
    records, settings = six_pairs()
    assert report_of(records, settings)["verdict"] == "PASS"
    late = {
        "chunk_times_s": tuple(101.0 + BURST_S / 2 * index for index in range(5)),
        "ended_s": 102.0,
    }
    at_once = {"chunk_times_s": (101.0,), "chunk_tokens": (5,), "ended_s": 101.0}
    for held_back, apart in ((late, 100), (at_once, 0)):
        report = report_of(
            [one.model_copy(update=held_back) if one.arm == arm else one for one in records],
            settings,
        )
        assert (report["verdict"], report["speedup"]) == ("INVALID", {})
        expected = (
            f"tokens arrived in a burst, {apart} microseconds apart ({arm}, pair 1, concurrency_1)"
        )
        assert report["reason"].startswith(expected)


@pytest.mark.parametrize(
    ("ttft", "tpot", "verdict"),
    [
        (0.10, 0.10, "PASS"),
        (0.05, 0.10, "PASS"),
        (0.25, 0.10, "PASS"),  # of 0.4 s that decoding gains, 0.25 are left
        (0.35, 0.10, "INVALID"),  # 0.15
        (0.50, 0.10, "INVALID"),  # nothing
        (1.50, 0.01, "INVALID"),  # TPOT is 20 times as fast, and all takes longer
        (0.10, 0.25, "FAIL"),
        (0.50, 0.25, "FAIL"),
    ],
)
def test_what_tpot_gains_end_to_end_latency_must_have_too(ttft, tpot, verdict):
    records, settings = six_pairs(ttft, tpot)
    report = report_of(records, settings)
    assert report["verdict"] == verdict, report["reason"]
    if verdict == "INVALID":
        assert "TPOT gains what end-to-end latency does not" in report["reason"]
        assert report["speedup"] == {}


def test_first_tokens_that_came_at_once_cannot_be():
    records, settings = six_pairs(ttft=0.0)
    assert (
        "first tokens arrived when their requests were sent"
        in report_of(records, settings)["reason"]
    )


def test_a_first_chunk_of_several_tokens_is_not_counted_as_one():
    """Four tokens come together, and four more 20 ms apart."""
    times = tuple(101.0 + 0.02 * index for index in range(5))
    chunked = {"chunk_times_s": times, "chunk_tokens": (4, 5, 6, 7, 8), "ended_s": times[-1]}
    one = RequestRecord(**record(tokens=8).model_dump() | chunked)
    assert measure(one).tpot_s == pytest.approx(0.02)
    assert measure(one).itl_s == pytest.approx([0.02] * 4)


def test_a_request_without_a_tpot_is_within_no_limit_of_it():
    at_once = {"chunk_times_s": (100.5,), "chunk_tokens": (5,)}
    slos = (parse_slo("tpot_p50=1s"),)
    summary = summarise_load(
        [record(), record(), record().model_copy(update=at_once)], "load", slos
    )
    assert summary.attainment == pytest.approx(2 / 3)
    assert not summary.meets_slos
    assert summarise_load([record()], "load", slos).meets_slos


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("settings", "pairs"), "many"),
        (("candidates", "pruned", "verdict"), None),
        (("arms",), []),
        (("reason",), None),
    ],
)
def test_a_report_that_is_not_whole_is_refused(tmp_path, path, value):
    records, settings = six_pairs()
    report = json.loads(json.dumps(report_of(records, settings)))
    (file := tmp_path / "report.json").write_text(json.dumps(report))
    assert read_report(file) == report
    part = report
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    file.write_text(json.dumps(report))
    with pytest.raises(UserError, match=f"is no whole report of a load test: {'.'.join(path)}"):
        read_report(file)
    del part[path[-1]]
    file.write_text(json.dumps(report))
    if path != ("settings", "pairs"):  # which has a default
        with pytest.raises(UserError, match="is no whole report of a load test"):
            read_report(file)


@pytest.mark.parametrize(
    "arms", [{}, {"pruned": {"speedup": {}}}, {"pruned": {"speedup": {"tpot": {"low": None}}}}]
)
def test_an_earlier_test_without_an_interval_is_nothing_to_compare_with(arms):
    gate = SpeedGate(1.0, {"verdict": "INVALID", "candidates": arms})
    with pytest.raises(UserError, match="has no speed-up of pruned with an interval"):
        gate.require_earlier(["pruned"])
    SpeedGate(
        1.0, {"verdict": "PASS", "candidates": {"pruned": {"speedup": {"tpot": {"low": 1.2}}}}}
    ).require_earlier(["pruned"])
