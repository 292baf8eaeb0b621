"""Whatever goes wrong in the supervisor: the state says so, no process is left, and the exit code
is not 0."""

import socket
from contextlib import closing
from threading import Event

import psutil
import pytest
from starlette.testclient import TestClient

from gradmap.common.errors import OutOfMemoryError, UserError
from serving import launch as launching
from serving import supervisor
from serving.admin import Admin
from serving.identity import Identity
from serving.launch import run
from serving.log import Log
from serving.server import ServerError
from serving.settings import ServerSettings
from serving.supervisor import Policy, State, Supervisor
from tests.serving.conftest import STAND_IN


def servers_left():
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if str(STAND_IN) in child.cmdline()
    ]


def test_a_port_that_is_taken_before_a_restart_is_a_failure(stand_in, tmp_path, monkeypatch, capfd):
    launch = stand_in("--live-s", "0.1")
    with closing(socket.socket()) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def take_the_port(failures):
            other.bind(("127.0.0.1", launch.settings.port))
            other.listen()
            return 0.0

        monkeypatch.setattr(supervisor, "back_off_s", take_the_port)
        assert run(launch, Log(tmp_path / "log")) == 1
    said = capfd.readouterr().err
    assert f"Gave up after 1 restarts: Cannot listen on 127.0.0.1:{launch.settings.port}" in said
    assert not servers_left()


@pytest.mark.parametrize(
    ("line", "for_memory"), [("torch.OutOfMemoryError: 2 GiB", True), ("ValueError: 2", False)]
)
def test_a_first_start_without_memory_may_be_tried_again(stand_in, tmp_path, line, for_memory):
    with pytest.raises(ServerError, match=line.partition(".")[2] or line) as caught:
        run(stand_in("--fail", line), Log(tmp_path / "log"))
    assert isinstance(caught.value, OutOfMemoryError) == for_memory


def test_a_mistake_of_ours_ends_the_server_and_is_raised(stand_in, tmp_path, monkeypatch):
    def stumble(*_):
        assert servers_left()
        return 1 / 0

    monkeypatch.setattr(Supervisor, "_become_ready", stumble)
    with pytest.raises(ZeroDivisionError):
        run(stand_in(), Log(tmp_path / "log"))
    assert not servers_left()


def test_a_mistake_while_it_is_watched_ends_the_server_too(stand_in, tmp_path, monkeypatch):
    def stumble(supervisors, stopping):
        if supervisors[0].status.was_ready:
            raise ZeroDivisionError

    monkeypatch.setattr(launching, "_stop_if_one_failed", stumble)
    with pytest.raises(ZeroDivisionError):
        run(stand_in(), Log(tmp_path / "log"))
    assert not servers_left()


@pytest.mark.parametrize("error", [UserError("taken"), ZeroDivisionError("oh"), RuntimeError()])
@pytest.mark.parametrize("place", ["__enter__", "wait_until_ready", "require_running", "__exit__"])
def test_every_exception_is_a_failure_that_probes_see(tmp_path, monkeypatch, error, place):
    killed = []

    class Broken:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_until_ready(self, on_poll):
            return "model"

        def require_running(self):
            raise KeyError("the end of this test, unless another place is broken")

        def kill(self):
            killed.append(True)

    def fail(*_):
        raise error

    monkeypatch.setattr(Broken, place, fail)
    monkeypatch.setattr(supervisor, "Server", Broken)
    monkeypatch.setattr(supervisor, "POLL_S", 0.0)
    broken = Supervisor(
        ServerSettings(tmp_path), Identity("model", 1), Policy(), Log(tmp_path / "log")
    )
    broken.run(Event())
    assert broken.status.state is State.FAILED
    assert broken.status.error == (str(error) or "RuntimeError")
    assert broken.failure is error
    assert TestClient(Admin([broken]).app()).get("/livez").status_code == 503
    assert killed or place == "__enter__"
