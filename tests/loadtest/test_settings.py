"""Settings of a load test: which blocks follow from them, and which are refused."""

import json
import math
from dataclasses import replace
from typing import cast

import pytest

from gradmap.common.errors import UserError
from loadtest.loads import ClosedLoop, OpenLoop
from loadtest.prompts import Workload
from loadtest.session import Session, run_session
from loadtest.settings import Block, LoadTestSettings, schedule
from tests.conftest import ROOT
from tests.loadtest.sessions import ONE

BAD_URLS = (
    "http://",
    "http://host:99999",
    "http://host:port",
    "http://host:0",
    "http://[::1",
    "http://me:secret@host",
    "http://host/?a=b",
    "http://host/#a",
    "http://host/a b",
    "http://host/\x1b[31m",
    "http://höst",
)
BAD_NAMES = (
    "",
    "dense",
    "dense-again",
    "a/b",
    "..",
    "-x",
    "a b",
    "a|b",
    "<b>",
    "a\nb",
    "\x1b[31m",
    "ä",
    "x" * 41,
)


@pytest.mark.parametrize(
    "vocabulary", [{}, {"vocab_size": 0}, {"vocab_size": "many"}, {"vocab_size": 1.5}]
)
def test_a_vocabulary_that_no_config_tells_is_asked_for(tmp_path, vocabulary):
    for name, config in (("dense", {"vocab_size": 100}), ("pruned", vocabulary)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    options = LoadTestSettings(str(tmp_path / "dense"), {"pruned": str(tmp_path / "pruned")})
    with pytest.raises(UserError, match="say with --vocabulary"):
        run_session(options, Session(tmp_path / "out"))


def test_full_sessions_interleave_the_arms_in_random_order(tmp_path):
    options = LoadTestSettings("a", {"pruned": "b"}, pairs=40, workload=Workload(seed=1))
    blocks = schedule(options)
    assert sorted(block.arm for block in blocks[:3]) == ["dense", "dense-again", "pruned"]
    assert [block.pair for block in blocks[:3]] == [0, 0, 0]
    pairs = [blocks[index : index + 2] for index in range(3, 81, 2)]
    assert all({block.arm for block in pair} == {"dense", "pruned"} for pair in pairs)
    assert all(pair[0].pair == pair[1].pair for pair in pairs)
    assert {pair[0].arm for pair in pairs} == {"dense", "pruned"}
    assert options.expected_records == 81 * (8 + 16)
    quick = schedule(replace(options, pairs=2, interleaved=False))
    assert quick == [Block("dense", 0), Block("dense", 1), Block("pruned", 0), Block("pruned", 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": "nowhere"}, "neither a URL nor a model directory"),
        ({"dense": "http://127.0.0.1:9"}, "does not answer"),
        ({"vocabulary": None}, "--vocabulary"),
        ({"vocabulary": 0}, "--vocabulary is 0"),
        *(({"dense": url}, "is no URL of a server") for url in BAD_URLS),
        *(
            ({"candidates": {name: "http://127.0.0.1:9"}}, "is no name for a model")
            for name in BAD_NAMES
        ),
        *(
            ({"loads": (ONE, OpenLoop("poisson", rate))}, "--rate")
            for rate in (math.nan, math.inf, -1.0)
        ),
        ({"loads": (ClosedLoop(cast(int, math.nan)),)}, "--concurrency must be 1 or more"),
        *(
            ({"open_loop_s": seconds}, "--open-loop-s is")
            for seconds in (math.nan, math.inf, 0.0, -1.0)
        ),
        (
            {"loads": (ONE, OpenLoop("poisson", 1.0)), "open_loop_s": 1e7},
            "more than 1000000 requests a block",
        ),
        ({"loads": (ONE, OpenLoop("poisson", 1e300))}, "more than 1000000 requests a block"),
        ({"requests_per_load": 10**7}, "more than 1000000 requests a block"),
        ({"models": {"other": "x"}}, "other is none"),
        (
            {"candidates": {"pruned": str(ROOT)}, "models": {"pruned": "x"}},
            "neither a URL nor a model directory",
        ),
        ({"workload": Workload(output_tokens=1)}, "TPOT is undefined"),
        ({"workload": Workload(shared_prefix=128)}, "shorter than --prompt-tokens"),
        ({"workload": Workload(length_spread=1.0)}, "from 0 to below 1"),
        ({"workload": Workload(length_spread=math.nan)}, "from 0 to below 1"),
        ({"workload": Workload(texts="file:x.txt", shared_prefix=3)}, "are for random prompts"),
        ({"workload": Workload(texts="file:x.txt")}, "--tokenizer"),
        ({"pairs": 0}, "--pairs is 0"),
        ({"processes": 0}, "--processes is 0"),
        ({"loads": (OpenLoop("poisson", 4),)}, "--concurrency is needed"),
        ({"loads": (ONE, OpenLoop("poisson", 0))}, "--rate a finite number above 0"),
        ({"candidates": {}}, "Give --pruned"),
        ({"find_rate": True}, "give --slo"),
    ],
)
def test_bad_input_is_refused(tmp_path, changes, message):
    base = {
        "dense": "http://127.0.0.1:9",
        "candidates": {"pruned": "http://127.0.0.1:9"},
        "vocabulary": 10,
    }
    with pytest.raises(UserError, match=message):
        run_session(LoadTestSettings(**(base | changes)), Session(tmp_path))
