"""Scores are kept on disk: whoever asks for the same again, after a crash or beside another, gets
them from there."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from gradmap.common.errors import UserError
from gradmap.evaluation.backends import Score, ScoreRequest
from gradmap.evaluation.scoring import CHUNK_REQUESTS, Scorer
from tests.gradmap.evaluation.counting_backend import CountingBackend

REQUESTS = [ScoreRequest((token,), (token,)) for token in range(2 * CHUNK_REQUESTS + 10)]
EXPECTED = [Score(-1.0 * token, 0) for token in range(2 * CHUNK_REQUESTS + 10)]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path))
    return {"model": "a"}


@pytest.mark.parametrize("cut_bytes", [0, 5])
def test_an_interrupted_evaluation_goes_on_where_it_was(kept, tmp_path, cut_bytes):
    with pytest.raises(KeyboardInterrupt):
        Scorer(CountingBackend(breaks_at=CHUNK_REQUESTS + 1), kept, "dense").score(REQUESTS, "task")
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_bytes(file.read_bytes()[: -cut_bytes or None])  # kill -9 in the middle of a line
    second = CountingBackend()
    assert Scorer(second, kept, "dense").score(REQUESTS, "task") == EXPECTED
    assert len(second.scored) == len(REQUESTS) - CHUNK_REQUESTS + bool(cut_bytes)
    third = CountingBackend()
    assert Scorer(third, kept, "dense").score(REQUESTS, "task") == EXPECTED
    assert third.scored == []


def test_scores_are_kept_for_one_model_and_its_requests_only(kept):
    Scorer(CountingBackend(), kept, "dense").score(REQUESTS, "task")
    for identity, requests, fresh in (
        ({"model": "b"}, REQUESTS, False),
        (kept, REQUESTS[1:], False),
        (kept, REQUESTS, True),
        (None, REQUESTS, False),
    ):
        backend = CountingBackend(value=-2.0)
        scores = Scorer(backend, identity, "dense", fresh).score(requests, "task")
        assert len(backend.scored) == len(requests)
        assert scores[-1].log_likelihood == -2.0 * requests[-1].continuation[-1]


@pytest.mark.parametrize(
    ("request_", "value", "message"),
    [
        (ScoreRequest((1,), (5,)), float("nan"), "task: what the model predicts is not finite"),
        (ScoreRequest((1,), (5,)), float("-inf"), "task: what the model predicts is not finite"),
        (
            ScoreRequest((1,), (100_000,)),
            -1.0,
            "the model knows only 100000: it is another model's",
        ),
        (ScoreRequest((1,) * 50, (5, 6)), -1.0, "longer than the 50"),
    ],
)
def test_what_cannot_be_scored_is_refused_and_not_kept(kept, tmp_path, request_, value, message):
    with pytest.raises(UserError, match=message):
        Scorer(CountingBackend(value=value), kept, "dense").score([request_], "task")
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    "order", ["reversed", "mixed with another's", "with what is no score", "of an older version"]
)
def test_a_kept_score_is_of_the_request_that_its_line_names(kept, tmp_path, order):
    """Whoever wrote the lines, in whatever order."""
    Scorer(CountingBackend(), kept, "dense").score(REQUESTS, "task")
    (file,) = tmp_path.rglob("*.jsonl")
    lines = file.read_text().splitlines()
    changed = {
        "reversed": lines[::-1],
        "mixed with another's": [
            line for pair in zip(lines, lines[::-1], strict=True) for line in pair
        ],
        "with what is no score": [
            "",
            "[]",
            "7",
            "null",
            '["key", NaN, 1]',
            '["key", -1.0, true]',
            '["a", "b", "c"]',
            "{",
            *lines[3:],
        ],
        "of an older version": [json.dumps(json.loads(line)[1:]) for line in lines],
    }[order]
    file.write_text("".join(f"{line}\n" for line in changed))
    again = CountingBackend()
    assert Scorer(again, kept, "dense").score(REQUESTS, "task") == EXPECTED
    left_out = {"with what is no score": 3, "of an older version": len(REQUESTS)}
    assert len(again.scored) == left_out.get(order, 0)


def test_a_score_that_is_not_finite_is_not_taken_from_the_cache(kept, tmp_path):
    Scorer(CountingBackend(), kept, "dense").score(REQUESTS[:2], "task")
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_text(file.read_text().replace("-1.0", "NaN"))
    assert Scorer(CountingBackend(), kept, "dense").score(REQUESTS[:2], "task") == EXPECTED[:2]


class SlowBackend(CountingBackend):
    """Scores nothing before it is allowed to."""

    def __init__(self):
        super().__init__()
        self.started, self.allowed = Event(), Event()

    def score(self, requests):
        self.started.set()
        assert self.allowed.wait(60)
        return super().score(requests)


def test_of_two_evaluations_of_the_same_the_second_waits_and_takes_what_the_first_scored(
    kept, tmp_path
):
    script = (
        "import sys; from gradmap.evaluation.scoring import Scorer\n"
        "from tests.gradmap.evaluation.counting_backend import CountingBackend\n"
        "from tests.gradmap.evaluation.test_kept_scores import EXPECTED, REQUESTS\n"
        "second = CountingBackend()\n"
        "assert Scorer(second, {'model': 'a'}, 'dense').score(REQUESTS, 'task') == EXPECTED\n"
        "print(len(second.scored))"
    )
    first = SlowBackend()
    with ThreadPoolExecutor() as pool:
        scores = pool.submit(Scorer(first, kept, "dense").score, REQUESTS, "task")
        assert first.started.wait(60)
        second = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert second.stderr is not None
        while b"Waiting for process" not in second.stderr.readline():
            assert second.poll() is None
        first.allowed.set()
        assert scores.result() == EXPECTED
    assert second.communicate()[0] == b"0\n"
    assert [path.name for path in (tmp_path / "scores").iterdir() if path.suffix != ".jsonl"] == []
