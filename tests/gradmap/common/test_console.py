"""What is printed while something runs: on a terminal, elsewhere, and by which of several
processes."""

import io
import threading
from contextlib import redirect_stderr
from queue import Queue

import pytest

from gradmap.common import console
from gradmap.common.console import announced, heartbeat, progress, say, waiting
from gradmap.common.heartbeat import Heartbeat

PATIENCE_S = 60.0


class Stream(io.StringIO):
    """What is written to it also comes out of a queue."""

    def __init__(self):
        super().__init__()
        self.written: Queue = Queue()

    def write(self, text):
        self.written.put(text)
        return super().write(text)

    def wait_for(self, part):
        while part not in (text := self.written.get(timeout=PATIENCE_S)):
            pass
        return text


class Terminal(Stream):
    def isatty(self):
        return True


@pytest.fixture
def impatient(monkeypatch):
    """Silence is broken at once. Returns where to, as stderr from now on."""
    monkeypatch.setattr(console, "_HEARTBEAT", Heartbeat(console.say, interval_s=0.001))
    return lambda: redirect_stderr(Stream())


def test_progress_says_lines_though_the_first_unit_does_not_end(impatient):
    with impatient() as stream, progress("Scoring layers", 3) as advance:
        assert stream.wait_for("Scoring layers: 0/3,").endswith(" s so far\n")
        advance(1)
        stream.wait_for("Scoring layers: 1/3,")
        advance(2)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Scoring layers: 0/3"
    assert lines[-1].startswith("Scoring layers: 3/3 in ")


def test_lines_of_several_threads_stay_whole(impatient):
    with impatient() as stream, waiting("A wait"):
        for number in range(200):
            say(f"message {number}")
        stream.wait_for("A wait,")
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("message")] == [
        f"message {number}" for number in range(200)
    ]
    assert all(line.startswith("message ") or line.endswith(" so far") for line in lines)


def test_a_wait_says_what_it_waits_for_now(impatient):
    phases = ["loading weights"]
    with impatient() as stream, waiting(lambda: f"Starting vLLM: {phases[-1]}"):
        stream.wait_for("Starting vLLM: loading weights, ")
        phases.append("compiling")
        stream.wait_for("Starting vLLM: compiling, ")


def test_a_quick_wait_says_nothing_and_an_announced_one_its_name(capsys):
    with waiting("Hashing"):
        pass
    with announced("Verifying"):
        pass
    assert capsys.readouterr().err == "Verifying\n"


def test_a_command_keeps_its_signature_under_the_decorator(impatient):
    @heartbeat(lambda elapsed_s: "gradmap command")
    def command(value: int) -> int:
        """Its help."""
        stream.wait_for("gradmap command")
        return value

    with impatient() as stream:
        assert (command(1), command(2)) == (1, 2)
    assert (command.__doc__, command.__annotations__) == (
        "Its help.",
        {"value": int, "return": int},
    )


def test_only_the_first_of_several_processes_talks(impatient, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    threads = threading.active_count()
    with impatient() as stream, progress("Scoring layers", 2) as advance, waiting("A wait"):
        advance(2)
        assert threading.active_count() == threads
        say("message")
    assert stream.getvalue() == ""


def test_a_terminal_shows_bars_and_waits_below_each_other_and_messages_above(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console.STDERR, "is_interactive", True)
    with (
        redirect_stderr(Terminal()) as terminal,
        waiting("Choosing [layers]"),
        progress("Scoring", 3) as advance,
    ):
        say("[a message]")
        advance(2)
        shown = terminal.wait_for("2/3")
        assert shown.index("Choosing [layers], ") < shown.index("Scoring")
        with waiting("Hashing"):
            shown = terminal.wait_for("Hashing")
        assert shown.index("2/3") < shown.index("Hashing, ")
    assert "[a message]\n" in terminal.getvalue()
