"""The real Locust where it is told otherwise by others, cannot write, or is ended; and a second
test in one place."""

import json
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from gradmap.common.errors import UserError
from loadtest import driving
from loadtest.board import Board
from loadtest.conclusions import SpeedGate
from loadtest.driving import BLOCK_TIMEOUT_S, Bench, run_load
from loadtest.endpoints import Endpoint
from loadtest.loads import ClosedLoop, OpenLoop
from loadtest.outcome import run_load_test
from loadtest.prompts import RandomPrompts, Workload
from loadtest.records import RECORDS_FILE, start_files
from loadtest.session import WARM_UP_REQUESTS, Session, run_session
from loadtest.settings import Block, LoadTestSettings
from tests.loadtest.fake_server import FakeServer, running

ONE = ClosedLoop(1)
OF_ANOTHER_TEST = ("report.json", "report.html", "report.md", "junit.xml", "records.parquet")


def send(url, out, load=ONE, output_tokens=4, **settings):
    """One load of dense."""
    workload = Workload(prompt_tokens=3, output_tokens=output_tokens)
    options = LoadTestSettings(url, {"pruned": url}, loads=(load,), workload=workload, **settings)
    bench = Bench(options, RandomPrompts(workload, 1000), Board(starts=0, loads=1), out)
    return run_load(Endpoint(url, "fake"), bench, Block("dense", 0), load)


@pytest.mark.alone
def test_what_locust_is_told_by_others_is_not_heard(tmp_path, monkeypatch):
    """Each of these alone leaves nothing to run, or waits for workers that nobody starts."""
    home, here = tmp_path / "home", tmp_path / "here"
    for directory, name in ((home, ".locust.conf"), (here, "locust.conf")):
        directory.mkdir()
        (directory / name).write_text(
            "tags = nothing\nmaster = true\nexpect-workers = 3\nrun-time = 1s\n"
        )
    (here / "pyproject.toml").write_text('[tool.locust]\nexclude_tags = ["a"]\nprocesses = 4\n')
    monkeypatch.setenv("HOME", str(home))
    for name, value in (
        ("TAGS", "nothing"),
        ("MODE_MASTER", "true"),
        ("PROCESSES", "3"),
        ("USER_CLASSES", "Other"),
    ):
        monkeypatch.setenv(f"LOCUST_{name}", value)
    monkeypatch.chdir(here)
    (here / "out").mkdir()
    with running(FakeServer()) as fake:
        measured = send(fake.url, (here / "out").relative_to(here), requests_per_load=3)
    assert [record.error for record in measured.requests] == [None] * 3


@pytest.mark.alone
@pytest.mark.parametrize("processes", [1, 2])
def test_a_load_generator_that_cannot_write_ends_at_once(tmp_path, processes):
    """A record of 400 tokens takes 7 kB; what is to be sent takes less than the 4 that a file may
    have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with running(FakeServer()) as fake:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(UserError, match=r"could not write below .*; is the disk full"):
                send(
                    fake.url,
                    tmp_path,
                    ClosedLoop(2),
                    output_tokens=400,
                    processes=processes,
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob(".load-*"))


def test_no_process_is_without_a_request():
    loads = (ONE, OpenLoop("poisson", 0.5), OpenLoop("poisson", 2.0), ClosedLoop(6))
    settings = LoadTestSettings(
        "a", {"pruned": "b"}, loads=loads, requests_per_load=1, open_loop_s=2.0, processes=8
    )
    assert [settings.requests_at(load) for load in loads] == [2, 1, 4, 12]
    assert [settings.processes_at(load) for load in loads] == [1, 1, 4, 6]


@pytest.mark.parametrize(("rate", "seconds"), [(1.0, 20.0), (1.0, 3000.0), (0.01, 20.0)])
def test_the_bound_of_a_load_follows_its_length(tmp_path, monkeypatch, rate, seconds):
    commands = []
    monkeypatch.setattr(driving, "_run_locust", lambda command, *_: commands.append(command))
    with pytest.raises(UserError, match="could not write"):  # nobody did
        send(
            "http://127.0.0.1:9",
            tmp_path,
            OpenLoop("constant", rate),
            open_loop_s=seconds,
            requests_per_load=8,
        )
    (command,) = commands
    limit_s = int(command[command.index("--run-time") + 1].removesuffix("s"))
    last_due_s = (max(8, rate * seconds) - 1) / rate
    assert limit_s == pytest.approx(BLOCK_TIMEOUT_S + last_due_s, abs=1)


@pytest.mark.alone
def test_a_warm_up_that_fails_whole_ends_the_test_with_what_the_server_said(tmp_path):
    def settings(url):
        workload = Workload(prompt_tokens=3, output_tokens=4)
        return LoadTestSettings(
            url, {"pruned": url}, loads=(ONE,), pairs=1, workload=workload, vocabulary=1
        )

    with running(
        FakeServer(faults={0: b'{"error": {"message": "maximum context length is 64"}}'})
    ) as fake:
        with pytest.raises(
            UserError, match=r"All 4 requests of the warm-up of .*maximum context length is 64"
        ):
            run_session(settings(fake.url), Session(tmp_path))
        assert len(fake.bodies) == WARM_UP_REQUESTS


@pytest.fixture
def earlier(tmp_path):
    """Files of a test that passed, with their contents."""
    start_files(tmp_path)
    for name in (*OF_ANOTHER_TEST, RECORDS_FILE):
        (tmp_path / name).write_text('{"verdict": "PASS"}')
    return {path: path.read_text() for path in tmp_path.iterdir()}


def test_an_earlier_test_stays_until_all_is_checked(tmp_path, earlier):
    unusable = {"verdict": "INVALID", "candidates": {}}
    with running(FakeServer()) as fake:
        for dense, gate in (
            ("http://127.0.0.1:9", SpeedGate(1.0)),
            (fake.url, SpeedGate(1.0, unusable)),
        ):
            settings = LoadTestSettings(dense, {"pruned": fake.url}, vocabulary=10)
            with pytest.raises(UserError):
                run_load_test(settings, gate, tmp_path)
            assert {path: path.read_text() for path in tmp_path.iterdir()} == earlier
        assert not fake.bodies


def test_a_test_that_starts_leaves_nothing_of_an_earlier_one(tmp_path, earlier):
    Session(tmp_path).start({}, None)
    assert {path.name for path in tmp_path.iterdir()} == {
        "records.jsonl",
        "blocks.jsonl",
        "resources.jsonl",
    }
    assert all(path.read_text() == "" for path in tmp_path.iterdir())


def end_in_the_middle(url, out, number, *options):
    """Sends a signal to a load test that has recorded something; returns its exit code, what it
    said, its children."""
    command = [
        "loadtest",
        "--dense",
        url,
        "--pruned",
        url,
        "--quick",
        "--vocabulary",
        "9",
        "--requests",
        "2",
    ]
    command += ["--output-tokens", "4", "--out", str(out), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "gradmap", *command], stderr=subprocess.PIPE, text=True
    )
    try:
        while process.poll() is None and not (out / RECORDS_FILE).is_file():
            time.sleep(0.1)
        while process.poll() is None and not (out / RECORDS_FILE).read_text():
            time.sleep(0.1)
        while process.poll() is None and not (children := locust_of(process.pid, options)):
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, said, children


def locust_of(parent, options):
    """Its processes, when all are there: of several that send requests, a master too."""
    with suppress(psutil.NoSuchProcess):
        found = [
            one
            for one in psutil.Process(parent).children(recursive=True)
            if "locust" in one.cmdline()
        ]
        return found if len(found) == (3 if "--processes" in options else 1) else []
    return []


@pytest.mark.alone
def test_sigterm_ends_every_process_and_keeps_what_was_measured_as_invalid(tmp_path):
    out = tmp_path / "out"
    with running(FakeServer(gap_s=0.01)) as fake:
        code, said, children = end_in_the_middle(
            fake.url, out, signal.SIGTERM, "--concurrency", "1"
        )
    assert code == 128 + signal.SIGTERM, said
    assert psutil.wait_procs(children, timeout=10)[1] == []
    report = json.loads((out / "report.json").read_text())
    assert (report["verdict"], report["speedup"]) == ("INVALID", {})
    assert " of 12 requests were recorded" in report["reason"]
    assert not list(out.glob(".load-*"))


@pytest.mark.alone
def test_no_process_outlives_a_load_test_that_is_killed(tmp_path):
    """Neither Locust's master nor its workers, whom it would tell nothing."""
    out = tmp_path / "out"
    with running(FakeServer(gap_s=0.01)) as fake:
        options = ("--concurrency", "4", "--processes", "2")
        code, _, children = end_in_the_middle(fake.url, out, signal.SIGKILL, *options)
    assert code == -signal.SIGKILL
    assert psutil.wait_procs(children, timeout=10)[1] == []
    Session(out).start({}, None)
    assert not list(out.glob(".load-*"))
