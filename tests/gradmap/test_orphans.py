"""What a library started for us does not outlive us."""

import signal
import subprocess
import sys

import psutil
import pytest

from gradmap.orphans import Watch
from tests.processes import ended

# Says which process it has started, that one ignoring all but SIGKILL, and waits.
OURS = """
import subprocess, sys, time
from gradmap.orphans import Watch
ignoring = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
watch = Watch([child.pid])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_does_not_notice_our_end_is_killed(number):
    with subprocess.Popen([sys.executable, "-c", OURS], stdout=subprocess.PIPE) as ours:
        left = psutil.Process(int(ours.stdout.readline()))
        try:
            assert left.is_running()
            ours.send_signal(number)
            ours.wait(60)
            assert ended([left.pid])
        finally:
            ours.kill()
            if left.is_running():
                left.kill()


def test_a_watch_that_is_closed_ends_what_it_watches():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        Watch([child.pid]).close()
        assert child.wait(60) == -signal.SIGKILL


def test_what_has_ended_before_is_no_error(capfd):
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    Watch([child.pid]).close()
    assert capfd.readouterr().err == ""
