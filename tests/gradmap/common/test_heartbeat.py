"""When something is said, and what is said of the rest. No test waits: clocks are set by hand."""

import threading
from queue import Queue

import pytest

from gradmap.common.heartbeat import Heartbeat, Pace, describe_s

PATIENCE_S = 60.0  # of a test whose other thread does not answer


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def said():
    return []


@pytest.fixture
def heartbeat(clock, said):
    return Heartbeat(said.append, 10.0, clock)


def test_nothing_is_guessed_before_the_first_unit_is_done():
    pace = Pace(212)
    assert pace.eta_s(87.0) is None
    assert pace.describe(87.0) == "0/212, 87 s so far"


def test_the_rest_goes_on_as_before_and_is_counted_down():
    pace = Pace(10)
    for unit in (1, 2, 3):
        pace.advance(1, 2.0 * unit)
    assert pace.eta_s(6.0) == pytest.approx(14.0)
    assert pace.eta_s(7.5) == pytest.approx(12.5)
    assert pace.describe(7.0) == "3/10, 7 s so far, ETA 13 s"


def test_nothing_is_guessed_of_what_should_have_been_done_by_now():
    pace = Pace(2)
    pace.advance(1, 5.0)
    assert pace.eta_s(9.0) == pytest.approx(1.0)
    assert pace.eta_s(11.0) is None
    pace.advance(1, 12.0)
    assert pace.describe(12.0) == "2/2, 12 s so far"


def test_what_an_earlier_run_had_done_is_not_taken_for_speed():
    pace = Pace(10_000)
    pace.advance(5_000, 0.0)
    assert pace.eta_s(5.0) is None
    pace.advance(500, 10.0)
    assert pace.eta_s(10.0) == pytest.approx(10.0 / 500 * 4_500)


def test_a_slow_first_unit_is_forgotten():
    pace = Pace(1_000)
    pace.advance(1, 100.0)
    for unit in range(1, 61):
        pace.advance(1, 100.0 + unit)
    assert pace.eta_s(160.0) == pytest.approx(1_000 - 61)


def test_the_guess_is_honest_after_a_lazy_search_has_ended_early():
    """As selector `repair` does: eight rounds of 30 layers and less; all are tried in the first,
    then five a round."""
    unit_s, works = 16.0, [30 - gone for gone in range(8)]
    tried = [29, *[5] * 7]
    pace, now_s = Pace(sum(works)), 0.0
    for number, (work, real) in enumerate(zip(works, tried, strict=True)):
        for _ in range(real):
            now_s += unit_s
            pace.advance(1, now_s)
        pace.advance(work - real, now_s)
        left_s = unit_s * sum(tried[number + 1 :])
        if 0 < number < 7:
            assert left_s / 1.5 < pace.eta_s(now_s) < left_s * 1.5
    assert pace.done == pace.total
    assert pace.eta_s(now_s) is None


def test_durations_are_short():
    assert [describe_s(seconds) for seconds in (0.4, 87, 599, 720, 7100, 12_300)] == [
        *("0 s", "87 s", "599 s", "12 min", "118 min", "3.4 h")
    ]


def test_a_line_comes_after_every_ten_seconds_though_nothing_advances(heartbeat, clock, said):
    waits = []

    def stopped(wait_s):
        waits.append(wait_s)
        clock.now_s += wait_s
        return len(waits) == 4

    with heartbeat.during(lambda elapsed_s: f"busy for {elapsed_s:.0f} s"):
        heartbeat.watch(stopped)
    assert said == ["busy for 10 s", "busy for 20 s", "busy for 30 s"]
    assert waits == [10.0] * 4


def test_what_else_was_said_puts_it_off(heartbeat, clock, said):
    with heartbeat.during(lambda elapsed_s: "busy"):
        clock.now_s = 9.0
        heartbeat.spoke()
        clock.now_s = 18.5
        heartbeat.beat()
        assert (said, heartbeat.wait_s) == ([], 0.5)
        clock.now_s = 19.0
        heartbeat.beat()
    assert said == ["busy"]


def test_the_innermost_of_several_things_is_said_and_a_quick_one_is_not(heartbeat, clock, said):
    with heartbeat.during(lambda elapsed_s: f"outer {elapsed_s:.0f}"):
        clock.now_s = 9.0
        with heartbeat.during(lambda elapsed_s: f"quick {elapsed_s:.0f}"):
            heartbeat.beat()
        with heartbeat.during(lambda elapsed_s: f"inner {elapsed_s:.0f}"):
            clock.now_s = 10.0
            heartbeat.beat()
        clock.now_s = 20.0
        heartbeat.beat()
    clock.now_s = 99.0
    heartbeat.beat()  # when all has ended, nothing is left to say
    assert said == ["inner 1", "outer 20"]


def test_silence_before_it_began_does_not_count(heartbeat, clock, said):
    clock.now_s = 1_000.0
    with heartbeat.during(lambda elapsed_s: "busy"):
        heartbeat.beat()
    assert said == []


def test_a_thread_beats_while_the_block_runs_and_ends_with_it():
    lines: Queue = Queue()
    heartbeat = Heartbeat(lines.put, interval_s=0.001)
    before = set(threading.enumerate())
    with (
        pytest.raises(ValueError, match="in the block"),
        heartbeat.during(lambda elapsed_s: "busy"),
    ):
        threads = set(threading.enumerate()) - before
        assert [thread.daemon for thread in threads] == [True]  # it does not keep a process alive
        assert [lines.get(timeout=PATIENCE_S) for _ in range(3)] == ["busy"] * 3
        raise ValueError("in the block")
    assert not any(thread.is_alive() for thread in threads)
