"""Starting and stopping a server process, without the minutes that a real one takes (see
test_endpoint)."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from gradmap.common.errors import OutOfMemoryError, UserError
from serving import server
from serving.log import Log
from serving.ports import free_port
from serving.server import Server, ServerError, check_servable
from serving.settings import ServerSettings, build_command, server_environment


@pytest.fixture
def settings(picos):
    return ServerSettings(picos["llama"].directory, port=free_port(), ready_timeout_s=30)


def test_flags_of_the_user_come_last(picos, tmp_path):
    command = build_command(
        ServerSettings(tmp_path, port=1234, vllm_flags=("--max-model-len", "64"))
    )
    assert command[-2:] == ["--max-model-len", "64"]
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_a_taken_port_is_refused_on_the_command_line(picos):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [
            sys.executable,
            "-c",
            "from serving.cli import main; main()",
            str(picos["llama"].directory),
        ]
        finished = subprocess.run(
            [*command, "--port", str(port)], capture_output=True, text=True, check=False
        )
    assert finished.returncode == 2
    assert f"Cannot listen on 127.0.0.1:{port} (Address already in use)" in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model directory"):
        check_servable(ServerSettings(tmp_path))


def use_script(monkeypatch, script):
    monkeypatch.setattr(server, "build_command", lambda settings: [sys.executable, "-c", script])


def test_a_server_that_ends_is_a_failure_even_with_code_0(settings, monkeypatch, tmp_path):
    use_script(monkeypatch, "print('(EngineCore pid=1) ValueError: no room', flush=True)")
    message = r"ended with code 0: ValueError: no room \(log: "
    with (
        pytest.raises(ServerError, match=message),
        Server(settings, Log(tmp_path / "log")) as running,
    ):
        running.wait_until_ready()


KILLED = "import os; os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(
    ("script", "for_memory"),
    [
        (KILLED, True),
        ("exit('torch.OutOfMemoryError: CUDA out of memory')", True),
        ('exit("RuntimeError: [enforce fail] DefaultCPUAllocator: can\'t allocate memory")', True),
        ("exit('ValueError: no room')", False),
        (KILLED.replace("9", "15"), False),
    ],
)
def test_a_server_that_memory_was_wanting_for_may_be_tried_again(
    settings, monkeypatch, tmp_path, script, for_memory
):
    use_script(monkeypatch, script)
    with pytest.raises(ServerError) as caught, Server(settings, Log(tmp_path / "log")) as running:
        running.wait_until_ready()
    assert isinstance(caught.value, OutOfMemoryError) == for_memory


def test_stopping_ends_children_that_ignore_sigterm(settings, monkeypatch, tmp_path):
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    use_script(
        monkeypatch,
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        "print(p.pid, flush=True); time.sleep(600)",
    )
    log = tmp_path / "log"
    with Server(settings, Log(log)):
        while not log.read_text().strip():
            time.sleep(0.1)
    pid = int(log.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_who_never_answers_is_waited_for_no_longer_than_for_a_start(
    settings, monkeypatch, tmp_path
):
    monkeypatch.setattr(server, "PROBE_TIMEOUT_S", 3600)
    with socket.socket() as silent:

        def command(_):  # after the port was found free
            silent.bind((settings.host, settings.port))
            silent.listen()
            return [sys.executable, "-c", "import time; time.sleep(600)"]

        monkeypatch.setattr(server, "build_command", command)
        starting = Server(replace(settings, ready_timeout_s=1), Log(tmp_path / "log"))
        with (
            pytest.raises(ServerError, match="did not complete a request within 1 s"),
            starting as running,
        ):
            running.wait_until_ready()


def test_a_key_that_cannot_be_sent_is_refused_before_the_start(settings, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "one\ntwo")
    with pytest.raises(UserError, match="The API key in VLLM_API_KEY"):
        check_servable(settings)


def test_a_server_knows_who_started_it(settings):
    assert server_environment(settings)["GRADMAP_PARENT"] == str(os.getpid())


def test_a_key_goes_into_the_environment_and_not_into_argv(settings, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hidden")
    assert "hidden" not in " ".join(build_command(settings))
    assert server_environment(settings)["VLLM_API_KEY"] == "hidden"
    assert os.environ["VLLM_API_KEY"] == "hidden"
