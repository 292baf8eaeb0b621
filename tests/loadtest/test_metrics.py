"""Metrics and verdicts of hand-made records with known answers."""

import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest

from gradmap.common.errors import UserError
from gradmap.common.verdict import Verdict
from loadtest.arrivals import ARRIVALS
from loadtest.cells import group_cells
from loadtest.driving import SEARCH_PAIR
from loadtest.loads import ClosedLoop, OpenLoop, list_loads, load_labels, search_load
from loadtest.metrics import (
    COMPARED,
    MAIN,
    METRICS,
    OF_REQUESTS,
    describe,
    measure,
    output_throughput,
)
from loadtest.options import LoadTestOptions
from loadtest.records import GpuSample, Measurements
from loadtest.resources import summarise_resources
from loadtest.slo import Slo, parse_slo
from loadtest.soundness import mean_in_flight
from loadtest.statistics import compute_speed_ups, headline, judge, speed_up
from loadtest.summaries import summarise_load
from loadtest.table import load_rows
from tests.command_line import gradmap
from tests.loadtest.measurements import (
    ONE,
    SETTINGS,
    cells_of,
    record,
    report_of,
    sample,
)


def test_definitions():
    metrics = measure(record())
    assert metrics.ttft_s == pytest.approx(0.5)
    assert metrics.e2el_s == pytest.approx(0.9)
    assert metrics.tpot_s == pytest.approx((0.9 - 0.5) / (5 - 1))
    assert metrics.itl_s == pytest.approx([0.1] * 4)


def test_tpot_counts_tokens_and_not_chunks():
    chunked = record(tokens=3).model_copy(
        update={"chunk_tokens": (1, 4, 9), "completion_tokens": 9}
    )
    assert measure(chunked).tpot_s == pytest.approx(0.2 / 8)
    assert len(measure(chunked).itl_s) == 2


def test_throughput_is_tokens_over_the_window():
    both = [record(sent=100.0), record(sent=100.2)]
    assert output_throughput(both) == pytest.approx(10 / 1.1)


def test_pauses_between_blocks_do_not_count():
    blocks = [record(pair=0, sent=100.0), record(pair=1, sent=900.0)]
    assert summarise_load(blocks, "load").output_throughput == pytest.approx(10 / 1.8)


def test_failed_requests_do_not_skew_times():
    summary = summarise_load([record(), record(ttft=99.0, error="HTTP 500")], "load")
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
    for value in compute_speed_ups(cells_of(records), "pruned", "dense", ONE).values():
        assert value.value == pytest.approx(2.0)
    opened = [record.model_copy(update={"load": "poisson_4"}) for record in records]
    assert "output_throughput" not in compute_speed_ups(
        cells_of(opened), "pruned", "dense", OpenLoop("poisson", 4)
    )


def test_the_headline_is_of_the_lowest_and_the_highest_concurrency():
    loads = (ClosedLoop(8), ONE, OpenLoop("poisson", 9.0))
    names = [metric.name for metric in COMPARED]
    by_load: Any = {load.name: {name: (load.name, name) for name in names} for load in loads}
    found: dict[str, Any] = headline(by_load, loads)
    assert found == {
        "tpot": ("concurrency_1", "tpot"),
        "ttft": ("concurrency_1", "ttft"),
        "output_throughput": ("concurrency_8", "output_throughput"),
    }


def test_an_open_loop_counts_from_the_schedule():
    metrics = measure(record(sent=100.0, scheduled=99.0))
    assert (metrics.ttft_s, metrics.e2el_s, metrics.send_lag_s) == pytest.approx((1.5, 1.9, 1.0))
    assert metrics.tpot_s == pytest.approx(0.1)


def test_slos():
    slos = (parse_slo("ttft_p50=600ms"), parse_slo("tpot_p99=0.2s"))
    assert slos == (Slo("ttft", 50, 0.6), Slo("tpot", 99, 0.2))
    good, slow, failed = record(), record(ttft=0.7), record(error="HTTP 500")
    summary = summarise_load([good, good, good, slow], "load", slos)
    assert summary.meets_slos
    assert summary.attainment == pytest.approx(3 / 4)
    assert summary.goodput == pytest.approx(3 / 1.1)
    assert not summarise_load([good, good, good, failed], "load", slos).meets_slos
    assert summarise_load([good, failed], "load", slos).attainment == pytest.approx(1 / 2)
    assert not summarise_load([slow, slow, good], "load", slos).meets_slos
    assert summarise_load([good], "load").attainment is None
    for text in ("ttft=200ms", "ttft_p95=200", "latency_p95=1s", "ttft_p0=1s", "ttft_p101=1s"):
        with pytest.raises(UserError, match="is not METRIC_pPERCENTILE=LIMIT"):
            parse_slo(text)


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
        ([1.3] * 6, 1.15, Verdict.INCONCLUSIVE),  # nothing that is measured scatters by nothing
        ([1.1] * 6, 1.15, Verdict.INCONCLUSIVE),
    ],
)
def test_verdicts(ratios, required, verdict):
    assert judge(speed_up(ratios), required).verdict == verdict


def test_nothing_is_concluded_from_failed_or_missing_requests():
    good = [record(arm) for arm in ("dense", "pruned") for _ in range(2)]
    assert report_of(good)["verdict"] == "INCONCLUSIVE"
    failed = [*good[:-1], record("pruned", error="cut")]
    for records in (failed, good[:-1]):
        report = report_of(records)
        assert report["verdict"] == "INVALID"
        assert report["speedup"] == {}


@pytest.mark.parametrize(
    ("block", "scheduled", "message"),
    [
        ({"client_cpu": 0.95}, None, "the load generator was busy 95% of the time"),
        (
            {"server_tokens": 9},
            None,
            r"the server generated 9 tokens and 10 arrived \(dense, pair 1, concurrency_1\)",
        ),
        ({}, 99.9, r"requests were sent late \(p99 100 ms"),
        ({"server_tokens": 10}, 99.99, None),
    ],
)
def test_nothing_is_concluded_from_a_client_that_did_not_see_it_all(block, scheduled, message):
    records = [record(arm, scheduled=scheduled) for arm in ("dense", "pruned") for _ in range(2)]
    report = report_of(records, **block)
    assert (report["verdict"] == "INVALID") == (message is not None)
    if message:
        assert re.search(message, report["reason"])


def test_several_candidates_have_a_verdict_each_and_the_worst_counts():
    settings = replace(SETTINGS, candidates={"pruned": "b", "more": "c"}, pairs=6)
    records = [
        record(arm, pair, tpot=tpot + 0.0001 * pair)
        for pair in range(6)
        for arm, tpot in (("dense", 0.2), ("pruned", 0.1), ("more", 0.19))
        for _ in range(2)
    ]
    report = report_of(records, settings, 1.5)
    assert {arm: one["verdict"] for arm, one in report["candidates"].items()} == {
        "pruned": "PASS",
        "more": "FAIL",
    }
    assert report["verdict"] == "FAIL"
    assert report["speedup"] == report["candidates"]["pruned"]["speedup"]


def test_an_extra_dense_block_tells_the_noise():
    settings = replace(SETTINGS, interleaved=True)
    records = [
        record(arm, tpot=tpot)
        for arm, tpot in (("dense", 0.2), ("dense-again", 0.21), ("pruned", 0.1))
    ] * 2
    noise = report_of(records, settings)["noise"]["concurrency_1"]
    assert noise["tpot"] == pytest.approx(0.2 / 0.21)


@pytest.mark.parametrize(
    ("pause", "message"),
    [(0.0, None), (0.04, None), (0.06, r"only 0\.9\d requests .*client paused")],
)
def test_nothing_is_concluded_from_a_client_that_pauses(pause, message):
    """A request takes 0.9 s, so that a pause of 0.06 s leaves 0.94 requests in flight."""
    records = [
        record(arm, sent=100 + k * (0.9 + pause)) for arm in ("dense", "pruned") for k in range(2)
    ]
    assert mean_in_flight(records[:2]) == pytest.approx(0.9 / (0.9 + pause))
    report = report_of(records)
    assert (report["verdict"] == "INVALID") == (message is not None)
    if message:
        assert re.search(message, report["reason"])


def test_requests_in_flight_are_counted_until_the_last_is_sent():
    assert mean_in_flight(
        [record(sent=at) for at in (100.0, 100.0, 100.9, 100.9)]
    ) == pytest.approx(2.0)
    assert mean_in_flight([record(), record()]) is None


def use_of(records, samples):
    cells = group_cells(Measurements(records, (), samples))
    return summarise_resources(cells.pairs("dense", ONE.name).values())


def test_what_the_machine_did_is_counted_while_requests_were_under_way():
    records = (record(), record(pair=1, sent=200.0))  # 0.9 s each
    outside = sample(99.0, cpu=1.0), sample(101.0, cpu=1.0), sample(100.5, pair=1, cpu=1.0)
    inside = sample(100.1, cpu=0.2), sample(200.5, pair=1, cpu=0.6)
    use = use_of(records, (*outside, *inside))
    assert use.cpu == pytest.approx(0.4)
    assert use.memory_bytes == 9
    assert (use.gpu, use.gpu_power_w, use.energy_per_token_j) == (None, None, None)
    assert use_of(records, outside) is None


def test_energy_is_power_times_time_over_tokens():
    told = {"utilisation": 0.5, "memory_bytes": 1, "clock_mhz": 1000, "throttled": False}
    gpus = tuple(GpuSample(power_w=power, **told) for power in (100.0, 200.0))
    silent = (GpuSample(power_w=None, **told | {"throttled": True}),) * 2
    samples = (sample(100.1, gpus=gpus), sample(100.6, gpus=silent))
    use = use_of((record(),), samples)
    assert use.energy_per_token_j == pytest.approx(300 * 0.9 / 5)
    assert (use.gpu, use.gpu_memory_bytes, use.gpu_power_w, use.gpu_clock_mhz) == (
        0.5,
        2,
        300.0,
        1000,
    )
    assert use.throttled == 0.5


def test_a_sum_over_gpus_of_which_one_does_not_tell_is_none():
    told = {"utilisation": None, "memory_bytes": 1, "clock_mhz": None, "throttled": None}
    gpus = (GpuSample(power_w=100.0, **told), GpuSample(power_w=None, **told))
    use = use_of((record(),), (sample(100.1, gpus=gpus),))
    assert (use.gpu_memory_bytes, use.gpu_power_w, use.energy_per_token_j) == (2, None, None)


def test_the_highest_rate_is_what_the_search_found():
    """Dense meets the SLO up to 0.5 requests a second, the pruned model at none that was tried."""
    settings = replace(SETTINGS, slos=(parse_slo("ttft_p50=600ms"),))
    searched = [
        record(arm, SEARCH_PAIR, search_load(rate).name, ttft=ttft)
        for arm, rate, ttft in (
            ("dense", 0.25, 0.5),
            ("dense", 0.5, 0.5),
            ("dense", 1.0, 0.7),
            ("dense", 0.7071, 0.7),
            ("pruned", 0.25, 0.7),
        )
    ]
    of_pairs = [record(arm) for arm in ("dense", "pruned") for _ in range(2)]
    report = report_of([*of_pairs, *searched], settings)
    assert report["highest_rate"] == {"dense": 0.5, "pruned": 0.0}
    assert report["verdict"] == "INCONCLUSIVE"  # the search is no pair, and faults none
    assert report["arms"]["dense"]["concurrency_1"]["requests"] == 2
    assert report_of(of_pairs, settings)["highest_rate"] == {}


def test_every_metric_is_in_the_report_the_table_and_the_summary():
    settings = replace(SETTINGS, slos=(parse_slo("ttft_p50=600ms"),))
    report = report_of([record(arm) for arm in ("dense", "pruned") for _ in range(2)], settings)
    names = [name for name, *_ in load_rows(report)]
    for metric in METRICS:
        assert report["arms"]["dense"]["concurrency_1"][metric.key] is not None
        assert f"concurrency 1: {metric.title}" in names
    assert report["speedup"].keys() == {metric.name for metric in MAIN}
    assert report["candidates"]["pruned"]["loads"]["concurrency_1"].keys() == {
        metric.name for metric in COMPARED
    }


@pytest.mark.parametrize("metric", OF_REQUESTS, ids=lambda metric: metric.name)
def test_every_metric_that_a_request_has_can_be_limited(metric):
    (value_s,) = metric.values([measure(record())])
    within, beyond = (parse_slo(f"{metric.name}_p50={limit_s}s") for limit_s in (1, 0.05))
    assert 0.05 < value_s < 1
    assert summarise_load([record()], "load", [within]).meets_slos
    assert not summarise_load([record()], "load", [beyond]).meets_slos


@pytest.mark.parametrize("law", ARRIVALS)
def test_every_law_of_arrival_is_known_to_the_command_line_and_to_recipes(law):
    assert law in gradmap("loadtest", "--help").stdout
    assert list_loads([1], [2.0], law)[1] == OpenLoop(law, 2.0)
    assert LoadTestOptions(arrivals=law).arrivals == law
    loads = {"settings": {"loads": [{"pattern": law, "level": 2.5}]}}
    assert load_labels(loads) == {OpenLoop(law, 2.5).name: f"{law} 2.5/s"}
