"""Requests that come at a rate, whether or not those before are answered, and the highest rate."""

import statistics
from dataclasses import replace
from itertools import pairwise

import pytest

from loadtest import loads
from loadtest.arrivals import ARRIVALS, arrival_times
from loadtest.conclusions import SpeedGate
from loadtest.loads import HIGHEST_RATE, LOWEST_RATE, OpenLoop, find_highest_rate
from loadtest.outcome import run_load_test
from loadtest.slo import parse_slo
from tests.loadtest.fake_server import FakeServer, running
from tests.loadtest.sessions import ONE, run, settings


@pytest.mark.alone
@pytest.mark.parametrize(
    "arrivals",
    ["poisson", *(pytest.param(name, marks=pytest.mark.slow) for name in [*ARRIVALS][1:])],
)
def test_requests_of_an_open_loop_are_sent_when_they_are_due(tmp_path, arrivals):
    """Two a second at 0.5 s apiece would be 1 a second, if each waited for the one before."""
    load = OpenLoop(arrivals, 20.0)
    with running(FakeServer(gap_s=0.125)) as fake:
        options = settings(fake, pairs=1, loads=(ONE, load), open_loop_s=3.0, requests_per_load=1)
        records = [record for record in run(options, tmp_path) if record.load == load.name]
    for arm in ("dense", "pruned"):
        of_arm = [record for record in records if record.arm == arm]
        of_arm.sort(key=lambda record: record.scheduled_s)
        assert len(of_arm) == 60
        scheduled = [record.scheduled_s for record in of_arm]
        sent = [record.sent_s for record in of_arm]
        assert scheduled[-1] - scheduled[0] == pytest.approx(59 / 20, rel=1e-6)
        assert all(due <= at < due + 0.05 for due, at in zip(scheduled, sent, strict=True))
        gaps = [later - earlier for earlier, later in pairwise(scheduled)]
        if arrivals == "constant":
            assert gaps == pytest.approx([0.05] * 59)
    dense, pruned = (
        sorted(record.scheduled_s for record in records if record.arm == arm)
        for arm in ("dense", "pruned")
    )
    assert [at - dense[0] for at in dense] == pytest.approx(
        [at - pruned[0] for at in pruned], abs=1e-6
    )


def test_arrivals_vary_as_their_name_says():
    """Coefficient of variation of the gaps: 0, 1 and 2."""
    expected_of = {"constant": 0.0, "poisson": 1.0, "burst": 2.0}
    assert expected_of.keys() == ARRIVALS.keys()
    for arrivals, expected in expected_of.items():
        times = arrival_times(arrivals, 5.0, 20_001, "seed")
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(0.2)
        # its standard error over 20,000 gaps is below 0.02 for both
        assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize("limit", [0.1, 0.3, 5.3, 100.0, 1e9])
def test_the_highest_rate_is_found(limit):
    tried = []
    found = find_highest_rate(lambda rate: tried.append(rate) or rate <= limit)
    if limit < LOWEST_RATE:
        assert found == 0
    elif limit > HIGHEST_RATE:
        assert found == HIGHEST_RATE
    else:
        assert found <= limit < 1.1 * found
    assert len(tried) == len(set(tried)) < 20


@pytest.mark.alone
@pytest.mark.slow
def test_the_highest_rate_that_a_server_keeps_up_with(tmp_path, monkeypatch):
    """The server answers one request at a time, in 40 ms: at 25/s, a queue grows."""
    monkeypatch.setattr(loads, "LOWEST_RATE", 5.0)
    monkeypatch.setattr(loads, "PRECISION", 3.0)
    with running(FakeServer(gap_s=0.01, serial=True)) as fake:
        options = settings(
            fake, pairs=1, loads=(ONE,), slos=(parse_slo("e2el_p90=250ms"),), find_rate=True
        )
        report = run_load_test(replace(options, open_loop_s=3.0), SpeedGate(0.1), tmp_path)
    assert report["arms"]["dense"]["concurrency_1"]["requests"] == 2
    for rate in report["highest_rate"].values():
        assert 5 <= rate <= 25
    assert "Highest rate that meets the SLOs: dense" in (tmp_path / "report.html").read_text()
