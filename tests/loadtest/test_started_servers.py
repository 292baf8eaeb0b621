"""Servers that a load test starts, without the minutes of a real one: one that is killed is why
requests failed."""

import sys

import psutil
import pytest

from gradmap.common.errors import OutOfMemoryError, UserError
from loadtest import driving, session
from loadtest.loads import ClosedLoop
from loadtest.prompts import Workload
from loadtest.session import Session, run_session
from loadtest.settings import LoadTestSettings
from serving import server
from tests.loadtest.measurements import measured, record
from tests.serving.conftest import STAND_IN


@pytest.fixture
def load_test(picos, monkeypatch, tmp_path):
    """Runs a test of two models; `load` is called in place of Locust for each load, the warm-up
    first."""
    monkeypatch.setattr(
        server, "build_command", lambda one: [sys.executable, str(STAND_IN), str(one.port)]
    )
    directory = str(picos["llama"].directory)
    settings = LoadTestSettings(
        directory,
        {"pruned": directory},
        loads=(ClosedLoop(1),),
        pairs=1,
        workload=Workload(),
    )

    def run(load):
        monkeypatch.setattr(session, "run_load", load)
        run_session(settings, Session(tmp_path / "out"))

    return run


def kill_server():
    (found,) = [one for one in psutil.Process().children() if str(STAND_IN) in one.cmdline()]
    found.kill()


def fails(*_):
    kill_server()
    return measured([record(error="gone")])


def breaks(*_):
    kill_server()
    raise UserError("nothing was recorded")


@pytest.mark.parametrize("load", [fails, breaks])
def test_want_of_memory_in_the_warm_up_is_said_and_not_that_its_requests_failed(load_test, load):
    with pytest.raises(OutOfMemoryError, match="vLLM was killed by signal 9"):
        load_test(load)


def test_want_of_memory_in_a_load_ends_the_test(load_test):
    calls = []

    def second_fails(*arguments):
        calls.append(arguments)
        return fails() if len(calls) == 2 else measured([record()])

    with pytest.raises(OutOfMemoryError, match="vLLM was killed by signal 9"):
        load_test(second_fails)
    assert len(calls) == 2


def test_what_failed_while_the_server_answers_is_said_as_it_is(load_test):
    with pytest.raises(
        UserError, match=r"All 1 requests of the warm-up of \w+ failed \(the first: too long\)"
    ) as caught:
        load_test(lambda *_: measured([record(error="too long")]))
    assert not isinstance(caught.value, OutOfMemoryError)


@pytest.mark.parametrize(("number", "for_memory"), [(9, True), (15, False)])
def test_a_load_generator_that_is_killed_may_be_tried_again(
    load_test, monkeypatch, tmp_path, number, for_memory
):
    command = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"]
    monkeypatch.setattr(driving, "_locust_command", lambda *_: command)
    with pytest.raises(UserError, match="Locust") as caught:
        load_test(driving.run_load)
    assert isinstance(caught.value, OutOfMemoryError) == for_memory
