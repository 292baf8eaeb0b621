"""The real Locust against a server of known behaviour: what is sent, what is stamped, what counts
as failed."""

import csv
import json
import subprocess
import sys

import pyarrow.parquet
import pytest

from loadtest import session
from loadtest.conclusions import SpeedGate
from loadtest.driving import run_load
from loadtest.loads import ClosedLoop, OpenLoop
from loadtest.outcome import run_load_test
from loadtest.prompts import Workload
from loadtest.records import read_measurements
from loadtest.session import WARM_UP_REQUESTS, Session
from loadtest.slo import parse_slo
from loadtest.soundness import mean_in_flight
from tests.command_line import gradmap
from tests.conftest import ROOT
from tests.loadtest.fake_server import FakeServer, running
from tests.loadtest.sessions import ONE, run, settings


def test_both_arms_get_the_same_token_ids_and_blocks_get_fresh_ones(tmp_path):
    with running(FakeServer()) as fake:
        options = settings(fake)
        records = run(options, tmp_path)
    assert len(records) == options.expected_records == 2 * 2 * (2 + 6)
    assert all(record.error is None and record.completion_tokens == 4 for record in records)
    names = {
        arm: [record.request for record in records if record.arm == arm]
        for arm in ("dense", "pruned")
    }
    assert names["dense"] == names["pruned"] or sorted(names["dense"]) == sorted(names["pruned"])
    prompts = [tuple(body["prompt"]) for body in fake.bodies]
    assert len(set(prompts)) == len(prompts) / 2  # every prompt twice: once for each arm
    for body in fake.bodies:
        assert (body["temperature"], body["ignore_eos"], body["stream"], body["max_tokens"]) == (
            0,
            True,
            True,
            4,
        )


def test_no_prompt_is_answered_from_the_prefix_cache_of_a_server_that_stays(tmp_path):
    with running(FakeServer()) as fake:
        options = settings(fake, pairs=1, loads=(ONE,), requests_per_load=3)
        run(options, tmp_path / "first")
        run(options, tmp_path / "second")
    loads: dict = {}
    for body in fake.bodies:
        loads.setdefault(body["cache_salt"], []).append(tuple(body["prompt"]))
    # two tests of dense and pruned, each of a warm-up and one load; salted alike only within a load
    assert sorted(map(len, loads.values())) == [3] * 4 + [4] * 4
    assert all(len(set(prompts)) == len(prompts) for prompts in loads.values())


@pytest.mark.alone
def test_tokens_are_stamped_when_they_arrive(tmp_path):
    with running(FakeServer(gap_s=0.2)) as fake:
        records = run(settings(fake, pairs=1, loads=(ONE,), requests_per_load=1), tmp_path)
    for record in records:
        (sent,) = [times for times in fake.sent_s if record.sent_s < times[0] < record.ended_s]
        assert record.chunk_tokens == (1, 2, 3, 4)
        arrived = record.chunk_times_s
        # a client that buffers would stamp a token only after the server had sent the next one, 200
        # ms later
        assert all(sent[k] <= arrived[k] for k in range(4))
        assert all(arrived[k] < sent[k + 1] for k in range(3))


@pytest.mark.parametrize("fault", ["http 500", "too few tokens", "cut short"])
def test_a_failed_request_is_recorded_as_failed(tmp_path, fault):
    with running(FakeServer()) as fake:
        options = settings(fake, pairs=1, loads=(ONE,))
        run(options, tmp_path)
        measured = [body["prompt"][0] for body in fake.bodies][-2:]
        fake.faults[measured[0]] = fault
        records = run(options, tmp_path)
    assert [record.error is None for record in records] == [False, True, False, True]


@pytest.mark.alone
@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_the_locust_file_works_by_itself(tmp_path, processes):
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(ROOT / "loadtest/driver/locustfile.py"),
        "--headless",
    ]
    with running(FakeServer(gap_s=0.01)) as fake:
        options = [
            "--host",
            fake.url,
            "--users",
            "2",
            "--run-time",
            "8s",
            "--output-tokens",
            "5",
            *processes,
        ]
        finished = subprocess.run(
            [*command, *options, "--csv", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=False,
        )
    assert finished.returncode == 0, finished.stderr
    rows = {row["Name"]: row for row in csv.DictReader((tmp_path / "out_stats.csv").open())}
    assert {"TTFT", "TPOT", "E2EL"} <= rows.keys()
    # its file may lack the last second; how many fit into the time, the machine decides
    assert 2 <= int(rows["E2EL"]["Request Count"]) <= len(fake.bodies)
    assert rows["E2EL"]["Failure Count"] == "0"
    assert 50 <= float(rows["E2EL"]["Average Response Time"]) < 200
    prompts = [tuple(body["prompt"]) for body in fake.bodies]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.alone
def test_the_locust_file_takes_none_of_several_models_silently():
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(ROOT / "loadtest/driver/locustfile.py"),
        "--headless",
    ]
    with running(FakeServer(models=[{"id": "a"}, {"id": "b"}])) as fake:
        finished = subprocess.run(
            [*command, "--host", fake.url, "--run-time", "60s"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert finished.returncode == 1
    assert f"{fake.url}: several models are served: 'a', 'b'; --model says which" in finished.stderr
    assert not fake.bodies


def test_the_verdict_is_the_exit_code(tmp_path):
    with running(FakeServer(gap_s=0.005)) as fake:
        command = [
            sys.executable,
            "-m",
            "gradmap",
            "loadtest",
            "--dense",
            fake.url,
            "--pruned",
            fake.url,
            "--quick",
        ]
        command += [
            "--requests",
            "2",
            "--concurrency",
            "1",
            "--output-tokens",
            "4",
            "--vocabulary",
            "100",
        ]
        out = tmp_path / "fail"
        failing = subprocess.run(
            [*command, "--require-speedup", "100", "--out", str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        fake.failing = {len(fake.bodies) + WARM_UP_REQUESTS + 1}  # the first that is measured
        out = tmp_path / "invalid"
        invalid = subprocess.run(
            [*command, "--out", str(out), "--json"], capture_output=True, text=True, check=False
        )
    assert failing.returncode == 1, failing.stderr
    assert json.loads((tmp_path / "fail" / "report.json").read_text())["verdict"] == "FAIL"
    assert invalid.returncode == 4, invalid.stderr
    assert json.loads(invalid.stdout.splitlines()[-1])["verdict"] == "INVALID"


@pytest.mark.alone
def test_several_processes_share_the_requests(tmp_path):
    open_loop = OpenLoop("constant", 20.0)
    with running(FakeServer(gap_s=0.05)) as fake:
        options = settings(
            fake,
            pairs=1,
            loads=(ONE, ClosedLoop(4), open_loop),
            open_loop_s=1.0,
            processes=2,
        )
        records = run(options, tmp_path)
    assert len(records) == options.expected_records == 2 * (2 + 8 + 20)
    assert all(record.error is None for record in records)
    for load in options.loads:
        names = [
            [record.request for record in records if (record.arm, record.load) == (arm, load.name)]
            for arm in options.arms
        ]
        assert sorted(names[0]) == sorted(names[1])
        assert len(set(names[0])) == options.requests_at(load)
    assert options.processes_at(ONE) == 1
    assert options.processes_at(ClosedLoop(4)) == options.processes_at(open_loop) == 2
    of_one_load = [
        record for record in records if (record.arm, record.load) == ("dense", "concurrency_4")
    ]
    # each request takes 0.2 s, and all four users have one under way until the last is sent
    assert mean_in_flight(of_one_load) == pytest.approx(4, rel=0.2)


@pytest.mark.alone
def test_a_report_can_be_computed_again_with_another_requirement(tmp_path):
    with running(FakeServer(gap_s=0.005)) as fake:
        options = settings(
            fake,
            loads=(ONE, OpenLoop("poisson", 20.0)),
            open_loop_s=0.5,
            slos=(parse_slo("ttft_p50=1s"),),
        )
        first = run_load_test(options, SpeedGate(0.1), tmp_path)
    assert first["verdict"] == "INCONCLUSIVE"  # two pairs cannot pass
    assert first["arms"]["dense"]["poisson_20"]["attainment"] == 1.0
    again = gradmap("report", tmp_path, "--json", "--parquet")
    assert again.returncode == 3, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == json.loads(json.dumps(first))
    assert pyarrow.parquet.read_table(tmp_path / "records.parquet").to_pylist() == [
        record.model_dump()
        | {name: list(getattr(record, name)) for name in ("chunk_times_s", "chunk_tokens")}
        for record in read_measurements(tmp_path).requests
    ]
    stricter = gradmap("report", tmp_path, "--require-speedup", 100)
    assert stricter.returncode == 1
    assert json.loads((tmp_path / "report.json").read_text())["required_speedup"] == 100
    assert gradmap("report", tmp_path / "nothing").returncode == 2


def test_what_a_killed_test_left_in_the_directory_goes(tmp_path):
    (tmp_path / ".load-abc" / "requests").mkdir(parents=True)
    Session(tmp_path).start({}, None)
    assert not list(tmp_path.glob(".load-*"))


def test_what_was_measured_before_an_interruption_is_kept_as_invalid(tmp_path, monkeypatch, picos):
    """And how many records of the prompts' file were of no use."""
    texts = [json.dumps({"text": f"w{number} w4"}) for number in range(3, 60)]
    (tmp_path / "texts.jsonl").write_text("\n".join([*texts, "{broken"]))
    workload = Workload(output_tokens=4, texts=f"file:{tmp_path}/texts.jsonl")
    with running(FakeServer()) as fake:
        run_one = run_load
        calls = []

        def interrupted(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return run_one(*arguments)

        monkeypatch.setattr(session, "run_load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            options = settings(fake, workload=workload, tokenizer=str(picos["llama"].directory))
            run_load_test(options, SpeedGate(1.0), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["prompts"] == {"records": 58, "skipped": 1}
    assert report["verdict"] == "INVALID"
    assert report["reason"].startswith("2 of 32 requests were recorded")
    assert len(read_measurements(tmp_path / "out").requests) == 2
