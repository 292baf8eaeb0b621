"""The real Locust against a server of known behaviour: what is sent, what is stamped, what counts as failed."""

import json
import subprocess
import sys

import pytest

from gradmap.errors import UserError
from loadtest.records import read_records
from loadtest.session import ARMS, Block, LoadTestSettings, run_session, schedule
from tests.loadtest.fake_server import FakeServer, running


def settings(fake, **changes):
    defaults = {
        "pairs": 2,
        "interleaved": False,
        "concurrency": (1, 3),
        "requests_per_block": 2,
        "prompt_tokens": 5,
        "output_tokens": 4,
        "vocabulary": 10**9,  # so that a prompt's first token tells it apart
    }
    return LoadTestSettings(fake.url, fake.url, **(defaults | changes))


def test_both_arms_get_the_same_token_ids_and_blocks_get_fresh_ones(tmp_path):
    with running(FakeServer()) as fake:
        options = settings(fake)
        records = run_session(options, tmp_path)
    assert len(records) == options.expected_records == 2 * 2 * (2 + 6)
    assert all(record.error is None and record.completion_tokens == 4 for record in records)
    assert read_records(tmp_path / "records.jsonl") == records
    names = {arm: [record.request for record in records if record.arm == arm] for arm in ARMS}
    assert names["dense"] == names["pruned"] or sorted(names["dense"]) == sorted(names["pruned"])
    prompts = [tuple(body["prompt"]) for body in fake.bodies]
    assert len(set(prompts)) == len(prompts) / 2  # every prompt twice: once for each arm
    for body in fake.bodies:
        assert (body["temperature"], body["ignore_eos"], body["stream"], body["max_tokens"]) == (0, True, True, 4)


def test_tokens_are_stamped_when_they_arrive(tmp_path):
    with running(FakeServer(gap_s=0.2)) as fake:
        records = run_session(settings(fake, pairs=1, concurrency=(1,), requests_per_block=1), tmp_path)
    for record in records:
        (sent,) = [times for times in fake.sent_s if record.sent_s < times[0] < record.ended_s]
        assert record.chunk_tokens == (1, 2, 3, 4)
        arrived = record.chunk_times_s
        # a client that buffers would stamp a token only after the server had sent the next one, 200 ms later
        assert all(sent[k] <= arrived[k] for k in range(4))
        assert all(arrived[k] < sent[k + 1] for k in range(3))


@pytest.mark.parametrize("fault", ["http 500", "too few tokens", "cut short"])
def test_a_failed_request_is_recorded_as_failed(tmp_path, fault):
    with running(FakeServer()) as fake:
        options = settings(fake, pairs=1, concurrency=(1,))
        run_session(options, tmp_path)
        measured = [body["prompt"][0] for body in fake.bodies][-2:]
        fake.faults[measured[0]] = fault
        records = run_session(options, tmp_path)
    assert [record.error is None for record in records] == [False, True, False, True]


def test_the_verdict_is_the_exit_code(tmp_path):
    with running(FakeServer(gap_s=0.005)) as fake:
        command = [sys.executable, "-m", "gradmap", "loadtest", "--dense", fake.url, "--pruned", fake.url, "--quick"]
        command += ["--requests", "2", "--concurrency", "1", "--output-tokens", "4", "--vocabulary", "100"]
        out = tmp_path / "fail"
        failing = subprocess.run(
            [*command, "--require-speedup", "100", "--out", str(out)], capture_output=True, text=True, check=False
        )
        fake.faults = dict.fromkeys(range(100), "http 500")
        out = tmp_path / "invalid"
        invalid = subprocess.run([*command, "--out", str(out), "--json"], capture_output=True, text=True, check=False)
    assert failing.returncode == 1, failing.stderr
    assert json.loads((tmp_path / "fail" / "report.json").read_text())["verdict"] == "FAIL"
    assert invalid.returncode == 4, invalid.stderr
    assert json.loads(invalid.stdout.splitlines()[-1])["verdict"] == "INVALID"


def test_full_sessions_interleave_the_arms_in_random_order(tmp_path):
    blocks = schedule(LoadTestSettings("a", "b", pairs=40, seed=1))
    pairs = [blocks[index : index + 2] for index in range(0, 80, 2)]
    assert all({block.arm for block in pair} == set(ARMS) and pair[0].pair == pair[1].pair for pair in pairs)
    assert {pair[0].arm for pair in pairs} == set(ARMS)
    quick = schedule(LoadTestSettings("a", "b", pairs=2, interleaved=False))
    assert quick == [Block("dense", 0), Block("dense", 1), Block("pruned", 0), Block("pruned", 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": "nowhere"}, "neither a URL nor a model directory"),
        ({"dense": "http://127.0.0.1:9"}, "does not answer"),
        ({"vocabulary": None}, "--vocabulary"),
        ({"output_tokens": 1}, "TPOT is undefined"),
        ({"pairs": 0}, "--pairs is 0"),
    ],
)
def test_bad_input_is_refused(tmp_path, changes, message):
    base = {"dense": "http://127.0.0.1:9", "pruned": "http://127.0.0.1:9", "vocabulary": 10}
    with pytest.raises(UserError, match=message):
        run_session(LoadTestSettings(**(base | changes)), tmp_path)
