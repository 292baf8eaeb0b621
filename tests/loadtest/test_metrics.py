"""Metrics and verdicts of hand-made records with known answers."""

import math
import random

import pytest

from gradmap.verdict import Verdict
from loadtest.metrics import describe, measure, output_throughput, summarise_load
from loadtest.outcome import build_report
from loadtest.records import RequestRecord
from loadtest.session import LoadTestSettings
from loadtest.statistics import compute_speed_ups, judge, speed_up


def record(arm="dense", pair=0, concurrency=1, ttft=0.5, tpot=0.1, tokens=5, sent=100.0, error=None):
    times = tuple(sent + ttft + tpot * index for index in range(tokens))
    return RequestRecord(
        arm=arm,
        pair=pair,
        concurrency=concurrency,
        request="r",
        prompt_tokens=3,
        requested_tokens=tokens,
        sent_s=sent,
        ended_s=times[-1],
        chunk_times_s=times,
        chunk_tokens=tuple(range(1, tokens + 1)),
        completion_tokens=tokens,
        error=error,
    )


def test_definitions():
    metrics = measure(record())
    assert metrics.ttft_s == pytest.approx(0.5)
    assert metrics.e2el_s == pytest.approx(0.9)
    assert metrics.tpot_s == pytest.approx((0.9 - 0.5) / (5 - 1))
    assert metrics.itl_s == pytest.approx([0.1] * 4)


def test_tpot_counts_tokens_and_not_chunks():
    chunked = record(tokens=3).model_copy(update={"chunk_tokens": (1, 4, 9), "completion_tokens": 9})
    assert measure(chunked).tpot_s == pytest.approx(0.2 / 8)
    assert len(measure(chunked).itl_s) == 2


def test_throughput_is_tokens_over_the_window():
    both = [record(sent=100.0), record(sent=100.2)]
    assert output_throughput(both) == pytest.approx(10 / 1.1)


def test_pauses_between_blocks_do_not_count():
    blocks = [record(pair=0, sent=100.0), record(pair=1, sent=900.0)]
    assert summarise_load(blocks, 1).output_throughput == pytest.approx(10 / 1.8)


def test_failed_requests_do_not_skew_times():
    summary = summarise_load([record(), record(ttft=99.0, error="HTTP 500")], 1)
    assert (summary.requests, summary.errors) == (2, 1)
    assert summary.ttft_s.mean == pytest.approx(0.5)


def test_percentiles_interpolate_and_need_ten_samples_beyond():
    distribution = describe([float(value) for value in range(101)])
    assert distribution.percentiles == {"p50": 50.0, "p90": 90.0, "p95": None, "p99": None}
    assert describe([0.0] * 10).percentiles["p50"] is None
    assert describe([0.0, 1.0] * 10).percentiles["p50"] == pytest.approx(0.5)
    assert describe([]) is None


def test_speed_up_is_above_one_when_the_pruned_model_is_faster():
    records = [
        record(arm, pair, tpot=tpot, ttft=5 * tpot)
        for pair in (0, 1)
        for arm, tpot in (("dense", 0.2), ("pruned", 0.1))
    ]
    for value in compute_speed_ups(records).values():
        assert value.value == pytest.approx(2.0)


def test_the_interval_covers_the_truth_at_its_nominal_rate():
    generator = random.Random(0)
    trials, covered = 2000, 0
    for _ in range(trials):
        value = speed_up([1.3 * math.exp(generator.gauss(0, 0.05)) for _ in range(6)])
        covered += value.low <= 1.3 <= value.high
    # a binomial share of 0.95 over 2000 trials has a standard error of 0.005: four of them
    assert covered / trials == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("ratios", "required", "verdict"),
    [
        ([1.30, 1.31, 1.29, 1.30, 1.32, 1.28], 1.15, Verdict.PASS),
        ([1.30, 1.31, 1.29], 1.15, Verdict.INCONCLUSIVE),  # too few pairs to pass
        ([1.05, 1.06, 1.04], 1.15, Verdict.FAIL),
        ([1.0, 1.3, 1.1, 1.2, 1.15, 1.1], 1.15, Verdict.INCONCLUSIVE),
        ([1.3], 1.15, Verdict.INCONCLUSIVE),
    ],
)
def test_verdicts(ratios, required, verdict):
    assert judge(speed_up(ratios), required).verdict == verdict


def test_nothing_is_concluded_from_failed_or_missing_requests():
    settings = LoadTestSettings("a", "b", pairs=1, concurrency=(1,), requests_per_block=2)
    good = [record(arm) for arm in ("dense", "pruned") for _ in range(2)]
    assert build_report(good, settings, 1.0)["verdict"] == "INCONCLUSIVE"
    failed = [*good[:-1], record("pruned", error="cut")]
    for records in (failed, good[:-1]):
        report = build_report(records, settings, 1.0)
        assert report["verdict"] == "INVALID"
        assert report["speedup"] == {}
