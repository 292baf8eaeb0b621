"""What is seen of a load while it runs, where there is no terminal."""

from threading import Event

from gradmap.common import console
from gradmap.common.heartbeat import Heartbeat
from loadtest import board
from loadtest.board import LOAD, START, Ahead, Board
from loadtest.loads import ClosedLoop


def test_a_load_is_described_though_no_request_has_ended(monkeypatch):
    said, heard = [], Event()

    def say(message):
        said.append(message)
        heard.set()

    monkeypatch.setattr(board, "say", say)
    monkeypatch.setattr(console, "_HEARTBEAT", Heartbeat(say, interval_s=0.001))
    with Board(1, 3).load("dense", "pair 1", ClosedLoop(8), 64):
        assert heard.wait(60)
    line = "dense, pair 1, concurrency 8: 0/64 requests, -/s, TTFT - ms, TPOT - ms, 0 failed"
    assert said[0] == line
    assert said[-1].startswith(line)


def test_the_rest_is_what_starts_and_loads_have_taken_each():
    """Of a session that ran: two servers, each with a warm-up and six loads. At one pace for both,
    it was said to take another 25 minutes after the first load, and took 4."""
    ahead = Ahead(starts=2, loads=14)
    assert ahead.eta_s(START, 30.0) is None
    ahead.done(START, 115.0)
    assert ahead.eta_s(LOAD, 3.0) is None
    ahead.done(LOAD, 8.0)
    assert ahead.eta_s(LOAD, 0.0) == 115 + 13 * 8
    assert ahead.eta_s(LOAD, 5.0) == 115 + 13 * 8 - 5
    for _ in range(6):
        ahead.done(LOAD, 8.0)
    assert ahead.eta_s(START, 15.0) == 100 + 7 * 8
    assert ahead.eta_s(START, 130.0) is None  # longer than the first
    ahead.done(START, 105.0)
    for _ in range(6):
        ahead.done(LOAD, 8.0)
    assert ahead.eta_s(LOAD, 2.0) == 6
