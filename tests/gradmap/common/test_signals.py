"""SIGTERM ends a command, and all that it started, as ctrl-C does; what was half done goes."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from gradmap.common.errors import EXIT_INTERRUPTED, EXIT_TERMINATED
from gradmap.common.files import atomic_directory
from gradmap.common.parent_death import bound_to_us
from gradmap.common.signals import Terminated, raising_signals
from serving.signals import Stop
from tests.processes import ended

# A command that is in the middle of a result, and tidies up for as long as it takes
COMMAND = """
import sys, time; from pathlib import Path; import typer
from gradmap.cli import run_app
from gradmap.common.files import atomic_directory
{imports}
app = typer.Typer()
@app.command()
def command() -> None:
    try:
        with atomic_directory(Path(sys.argv[1]), marker="result") as partial:
            (partial / "half").write_text("")
            {work}
    finally:
        time.sleep(0.2)
        Path(sys.argv[1]).with_name("tidied").write_text("")
sys.exit(run_app(lambda **options: app(args=[], **options)))
"""
SLEEPING = "print('ready', flush=True); time.sleep(600)"


def start(tmp_path, work=SLEEPING, imports=""):
    script = COMMAND.format(work=work, imports=imports)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.readline()
    assert first, process.communicate()[1]
    return process, first.split()


@pytest.mark.parametrize(
    ("numbers", "code", "said"),
    [
        ([signal.SIGTERM], EXIT_TERMINATED, "Ended by SIGTERM."),
        ([signal.SIGINT], EXIT_INTERRUPTED, "Interrupted."),
        # of the group, and of our parent
        ([signal.SIGTERM, signal.SIGTERM], EXIT_TERMINATED, "Ended by SIGTERM."),
        ([signal.SIGINT, signal.SIGTERM], EXIT_INTERRUPTED, "Interrupted."),
    ],
)
def test_a_command_tidies_up_before_it_ends(tmp_path, numbers, code, said):
    process, _ = start(tmp_path)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (code, said + "\n")
    assert [path.name for path in tmp_path.iterdir()] == ["tidied"]


# What a stage of `run` is, and the fresh process in which a stage runs what it exported
STAGE = (
    "run_process([sys.executable, '-c', {script!r}, str(Path(sys.argv[1]).with_name('of_stage'))])"
)
CHILD = (
    "import os, subprocess, sys, time; print(os.getpid(), subprocess.Popen(['sleep', '600']).pid, "
    "flush=True); "
)


def test_a_stage_gets_the_signal_and_is_waited_for(tmp_path):
    stage = COMMAND.format(
        imports="import os", work="print(os.getpid(), flush=True); time.sleep(600)"
    )
    process, started = start(
        tmp_path, STAGE.format(script=stage), "from gradmap.common.children import run_process"
    )
    assert (tmp_path / ".of_stage.lock").exists()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == EXIT_TERMINATED
    assert not psutil.pid_exists(int(started[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["tidied"]


def test_a_stage_of_a_killed_command_ends_and_the_next_run_removes_its_half_of_a_result(tmp_path):
    """What it had started ends with it; its partial directory and its lock stop nobody."""
    stage = COMMAND.format(
        imports="import subprocess; from gradmap.common.children import run_process",
        work="run_process([sys.executable, '-c', 'import os, time; "
        "print(os.getpid(), os.getppid(), flush=True); time.sleep(600)'])",
    )
    process, started = start(
        tmp_path, STAGE.format(script=stage), "from gradmap.common.children import run_process"
    )
    process.kill()
    process.communicate(timeout=60)
    assert ended(map(int, started))
    left = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
    assert left == {".out.lock", ".out.partial", ".of_stage.lock", ".of_stage.partial"}
    for name in ("out", "of_stage"):
        with atomic_directory(tmp_path / name, marker="result") as partial:
            (partial / "result").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of_stage", "out"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process that its parent has died"
)
@pytest.mark.parametrize("dead", [False, True])
def test_a_program_whose_parent_died_before_it_began_does_not_begin(dead):
    parent = subprocess.Popen(["true"])
    parent.wait()
    _, *options, number = bound_to_us([])
    command = [sys.executable, *options, str(parent.pid) if dead else number, "echo", "begun"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.stdout == ("" if dead else "begun\n")


@pytest.mark.parametrize("end", ["terminate", "kill"])
@pytest.mark.parametrize("threads", [0, 2])
def test_what_a_command_runs_in_fresh_processes_ends_too(tmp_path, threads, end):
    """With what those have started, whether they are run in the main thread or in others."""
    script = (
        CHILD.replace("flush=True", "file=open(sys.argv[1], 'w'), flush=True") + "time.sleep(600)"
    )
    command = f"[sys.executable, '-c', {script!r}, str(Path(sys.argv[1]).with_name(name))]"
    one = f"(lambda name: run_captured({command}, os.environ))"
    pool = (
        "print('ready', flush=True)\n"
        "            with ThreadPoolExecutor(2) as pool, ending_children():\n"
        f"                list(pool.map({one}, ('0', '1')))"
    )
    imports = (
        "import os; from concurrent.futures import ThreadPoolExecutor\n"
        "from gradmap.common.children import ending_children, run_captured"
    )
    process, _ = start(
        tmp_path, pool if threads else f"print('ready', flush=True); {one}('0')", imports
    )
    numbers = [
        number for name in range(max(1, threads)) for number in read_numbers(tmp_path / str(name))
    ]
    getattr(process, end)()
    process.communicate(timeout=60)
    if end == "terminate":
        assert process.returncode == EXIT_TERMINATED
    else:  # of what those have started, nobody knows any more
        for number in numbers[1::2]:
            os.kill(number, signal.SIGKILL)
    assert ended(numbers)


def read_numbers(path):
    while not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.02)
    return [int(number) for number in path.read_text().split()]


def test_what_a_killed_stage_left_is_killed():
    script = CHILD + "os.kill(os.getpid(), 9)"
    outer = (
        "import sys; from gradmap.common.children import run_process\n"
        f"print(run_process([sys.executable, '-c', {script!r}])[0])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", outer], capture_output=True, text=True, check=True, timeout=60
    )
    numbers, code = finished.stdout.splitlines()
    assert int(code) == -signal.SIGKILL
    assert ended([int(number) for number in numbers.split()])


def test_a_fork_of_a_command_ends_as_any_process_does():
    ready, says_so = os.pipe()
    with raising_signals():
        child = os.fork()
        if child == 0:
            os.write(says_so, b".")
            time.sleep(20)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


HANDLED = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_where_nothing_came_handlers_are_those_of_before(handlers):
    with raising_signals():
        assert not {signal.getsignal(number) for number in HANDLED} & set(handlers.values())
    assert {number: signal.getsignal(number) for number in HANDLED} == handlers


def test_what_is_ignored_stays_ignored(handlers):
    # as of a program that a script starts in the background
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.raises(Terminated), raising_signals() as received:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_process_that_is_about_to_end_is_not_killed_by_a_second_signal(handlers):
    with pytest.raises(Terminated), raising_signals():
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


def test_a_server_drains_as_before():
    stop = Stop()
    with raising_signals() as received:
        with pytest.raises(Terminated), raising_signals():
            signal.raise_signal(signal.SIGTERM)
        with stop.on_signals(()):
            signal.raise_signal(signal.SIGTERM)
        assert stop.event.is_set() and not stop.interrupted
    assert received == []
