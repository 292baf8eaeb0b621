"""The life of a supervised server, with a stand-in for vLLM that starts in a second (the real one:
test_endpoint)."""

import os
import signal
import socket
import threading
import time
from dataclasses import replace
from functools import partial

import httpx
import psutil
import pytest

from gradmap.common.errors import UserError
from gradmap.common.heartbeat import Heartbeat
from serving import server, supervisor
from serving.identity import Identity, Trust
from serving.launch import run
from serving.log import Log
from serving.settings import ServerSettings
from serving.supervisor import Policy, Supervisor, back_off_s
from tests.serving.conftest import STAND_IN


def run_in_this_process(launch, log, then):
    """Runs it with `then` in another thread, once it is ready; returns the exit code."""

    def wait_and_act():
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{launch.admin_port}/readyz").status_code == 200:
                    return then()
            except httpx.TransportError:
                pass
            time.sleep(0.05)

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    return run(launch, log)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_exit_code_tells_who_asked_for_the_end(stand_in, tmp_path, number, code):
    log = Log(tmp_path / "log")
    assert run_in_this_process(stand_in(), log, lambda: os.kill(os.getpid(), number)) == code
    assert not [child for child in psutil.Process().children() if str(STAND_IN) in child.cmdline()]


def test_a_first_start_that_fails_is_not_repeated(stand_in, tmp_path):
    launch = stand_in("--fail", "(EngineCore pid=1) ValueError: no room")
    with pytest.raises(
        UserError, match=r"vLLM ended with code 3: ValueError: no room \(log: .*log\)"
    ):
        run(launch, Log(tmp_path / "log"))


def test_an_exit_that_nobody_asked_for_is_mended_so_many_times(
    stand_in, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(supervisor, "back_off_s", lambda failures: 0.1)
    launch = stand_in("--live-s", "0.5", policy=Policy(restarts=2))
    assert run(launch, Log(tmp_path / "log")) == 1
    said = capfd.readouterr().err
    assert "Restart 1 of 2" in said
    assert "Restart 2 of 2" in said
    assert "Gave up after 2 restarts: vLLM ended with code 0" in said


def test_a_start_that_takes_long_says_again_what_it_waits_for(tmp_path, picos, monkeypatch):
    said, heard_again, stopping = [], threading.Event(), threading.Event()

    class SlowServer:
        """Is ready when the phase has been said three times."""

        def __init__(self, settings, log, on_phase):
            self._on_phase = on_phase

        def __enter__(self):
            self._on_phase("compiling")
            return self

        def __exit__(self, *_):
            pass

        def wait_until_ready(self, on_poll):
            assert heard_again.wait(60)
            stopping.set()
            return "model"

    class Listening(Log):
        def say(self, message, level="INFO"):
            said.append(message)
            if sum(line.endswith("s] compiling") for line in said) == 3:
                heard_again.set()

    monkeypatch.setattr(supervisor, "Server", SlowServer)
    monkeypatch.setattr(supervisor, "Heartbeat", partial(Heartbeat, interval_s=0.001))
    settings = ServerSettings(picos["llama"].directory)
    Supervisor(settings, Identity("model", 1), Policy(), Listening(tmp_path / "log")).run(stopping)
    assert any(line.startswith("Ready after") for line in said)


def test_the_back_off_doubles_up_to_a_minute():
    assert [back_off_s(failures) for failures in (1, 2, 3, 7, 50)] == [1, 2, 4, 60, 60]


def test_readiness_ends_before_the_server_does(stand_in, tmp_path):
    launch = stand_in(policy=Policy(balancer_wait_s=1.0))
    seen = {}

    def ask_while_draining():
        os.kill(os.getpid(), signal.SIGTERM)
        while (
            answer := httpx.get(f"http://127.0.0.1:{launch.admin_port}/readyz")
        ).status_code == 200:
            time.sleep(0.02)
        seen["state"] = next(iter(answer.json().values()))["state"]
        seen["answers"] = httpx.get(f"{launch.settings.url}/health").status_code
        seen["live"] = httpx.get(f"http://127.0.0.1:{launch.admin_port}/livez").status_code

    assert run_in_this_process(launch, Log(tmp_path / "log"), ask_while_draining) == 0
    assert seen == {"state": "draining", "answers": 200, "live": 200}


def test_a_second_ctrl_c_does_not_wait(stand_in, tmp_path):
    launch = stand_in("--ignore-sigterm", policy=Policy())

    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    started = time.monotonic()
    assert run_in_this_process(launch, Log(tmp_path / "log"), interrupt_twice) == 130
    assert time.monotonic() - started < launch.settings.drain_s  # it would take this and 15 s more


def test_the_second_of_two_models_starts_when_the_first_is_ready(
    stand_in, tmp_path, picos, monkeypatch
):
    launch = replace(
        stand_in(),
        models=[picos["llama"].directory, picos["qwen2"].directory],
        trusts=[Trust()] * 2,
    )
    first_answers: list[bool] = []
    # the stand-in's, which was put there above
    build_stand_in = vars(server)["build_command"]

    def note_and_build(settings):
        with socket.socket() as probe:
            first_answers.append(probe.connect_ex(("127.0.0.1", launch.settings.port)) == 0)
        return build_stand_in(settings)

    monkeypatch.setattr(server, "build_command", note_and_build)
    assert (
        run_in_this_process(
            launch, Log(tmp_path / "log"), lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
        == 0
    )
    assert first_answers == [False, True]


def test_a_first_model_that_fails_keeps_the_second_from_starting(stand_in, tmp_path, picos):
    launch = stand_in("--fail", "ValueError: no room")
    launch = replace(
        launch, models=[picos["llama"].directory, picos["qwen2"].directory], trusts=[Trust()] * 2
    )
    with pytest.raises(UserError, match="vLLM ended with code 3: ValueError: no room"):
        run(launch, Log(tmp_path / "log"))


def test_two_models_are_ready_when_both_are(stand_in, tmp_path, picos, capfd):
    launch = stand_in()
    launch = replace(
        launch, models=[picos["llama"].directory, picos["qwen2"].directory], trusts=[Trust()] * 2
    )
    seen = {}

    def ask():
        seen["info"] = httpx.get(f"http://127.0.0.1:{launch.admin_port}/info").json()
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_in_this_process(launch, Log(tmp_path / "log"), ask) == 0
    ports = [int(one["url"].rpartition(":")[2]) for one in seen["info"]]
    assert ports == [launch.settings.port, launch.settings.port + 1]
    assert [one["name"] for one in seen["info"]] == ["llama", "qwen2"]
    assert "each gets 1/2 of the memory" in capfd.readouterr().err
