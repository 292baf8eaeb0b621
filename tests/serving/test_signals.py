"""Signals that come before there is a server to stop, and parents that die before their children
can know."""

import os
import signal
import subprocess
import sys

import pytest

from serving.ports import free_port

HASHING = """
import time
import serving.launch

def identify(*_):
    print("hashing", flush=True)
    time.sleep(600)

serving.launch.identify = identify
from serving.cli import main
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_the_artifact_is_hashed_ends_it_at_once(picos, tmp_path, number, code):
    options = [
        str(picos["llama"].directory),
        "--port",
        str(free_port()),
        "--log",
        str(tmp_path / "log"),
    ]
    options += ["--admin-port", str(free_port())]
    process = subprocess.Popen([sys.executable, "-c", HASHING, *options], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"hashing\n"
        process.send_signal(number)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.wait()


ORPHAN = "from serving.vllm_server import bind_to_parent; bind_to_parent(); print('alive')"


def test_a_server_notices_that_its_parent_died_before_it_asked_for_the_signal():
    ended = subprocess.Popen(["true"])
    ended.wait()
    for parent, says in ((os.getpid(), "alive\n"), (ended.pid, "")):
        environment = {**os.environ, "GRADMAP_PARENT": str(parent)}
        command = [sys.executable, "-c", ORPHAN]
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert (finished.stdout, finished.returncode == 0) == (says, bool(says))


def test_what_a_server_spawns_knows_its_own_parent():
    child = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {ORPHAN!r}]))"
    command = [
        sys.executable,
        "-c",
        f"from serving.vllm_server import bind_to_parent; bind_to_parent(); {child}",
    ]
    environment = {**os.environ, "GRADMAP_PARENT": str(os.getpid())}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert finished.stdout == "alive\n"
