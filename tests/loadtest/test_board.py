"""What is seen of a load while it runs, where there is no terminal."""

from threading import Event

from gradmap import console
from gradmap.heartbeat import Heartbeat
from loadtest import board
from loadtest.board import Board
from loadtest.loads import Load


def test_a_load_is_described_though_no_request_has_ended(monkeypatch):
    said, heard = [], Event()

    def say(message):
        said.append(message)
        heard.set()

    monkeypatch.setattr(board, "say", say)
    monkeypatch.setattr(console, "_HEARTBEAT", Heartbeat(say, interval_s=0.001))
    with Board(3).load("dense", "pair 1", Load("concurrency", 8), 64):
        assert heard.wait(60)
    line = "dense, pair 1, concurrency 8: 0/64 requests, -/s, TTFT - ms, TPOT - ms, 0 failed"
    assert said[0] == line
    assert said[-1].startswith(line)
