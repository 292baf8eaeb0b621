"""What a library started for us does not outlive us."""

import signal
import subprocess
import sys

import psutil
import pytest

from tests.processes import ended

# Says which processes it has started by multiprocessing, the second by way of the first, and does
# as it is told. They end by SIGKILL alone.
OURS = """
import multiprocessing, os, signal, sys, time
from gradmap.common.orphans import Watch

def wait(pipe, more):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if more:
        context.Process(target=wait, args=(pipe, False)).start()
    pipe.send(os.getpid())
    time.sleep(600)

context = multiprocessing.get_context("fork")
ours, theirs = context.Pipe()
context.Process(target=wait, args=(theirs, True)).start()
started = ours.recv(), ours.recv()
watch = Watch()
print(*started, flush=True)
if sys.stdin.readline() == "close":
    watch.close()
time.sleep(600)
"""


@pytest.fixture
def started():
    """A process of ours, and the numbers of those that it has started."""
    with subprocess.Popen(
        [sys.executable, "-c", OURS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as ours:
        numbers = [int(number) for number in ours.stdout.readline().split()]
        try:
            assert len(numbers) == 2 and all(map(psutil.pid_exists, numbers))
            yield ours, numbers
        finally:
            ours.kill()
            for number in filter(psutil.pid_exists, numbers):
                psutil.Process(number).kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_does_not_notice_our_end_is_killed(started, number):
    ours, numbers = started
    ours.send_signal(number)
    ours.wait(60)
    assert ended(numbers)


def test_a_watch_that_is_closed_ends_what_it_watches(started):
    ours, numbers = started
    ours.stdin.write(b"close")
    ours.stdin.close()
    assert ended(numbers)
    assert ours.poll() is None
