"""Where models are served: URLs as people write them, lists of models, counters of one server and
of several."""

import re
import time
from itertools import count, cycle

import pytest

from gradmap.common.errors import UserError
from loadtest import counters
from loadtest.counters import Counter, read_counter, tokens_since
from loadtest.endpoints import Endpoint, find_endpoints
from loadtest.settings import LoadTestSettings
from loadtest.urls import base_url, completions_path
from tests.loadtest.fake_server import FakeServer, running


@pytest.mark.parametrize(
    ("written", "url", "path"),
    [
        ("http://host:8000", "http://host:8000", "/v1/completions"),
        ("http://host:8000/", "http://host:8000", "/v1/completions"),
        ("http://host:8000/v1", "http://host:8000", "/v1/completions"),
        ("http://host:8000/v1/", "http://host:8000", "/v1/completions"),
        ("https://host/team-a", "https://host/team-a", "/team-a/v1/completions"),
        ("https://host/team-a/v1", "https://host/team-a", "/team-a/v1/completions"),
        ("https://host/v1/b", "https://host/v1/b", "/v1/b/v1/completions"),
        ("http://[::1]:65535/v1", "http://[::1]:65535", "/v1/completions"),
        ("HTTP://host", "http://host", "/v1/completions"),
    ],
)
def test_a_url_may_have_a_prefix_and_the_v1_of_other_clients(written, url, path):
    assert base_url(written) == url == base_url(url)
    assert completions_path(url) == path


def found(fake, **models):
    settings = LoadTestSettings(fake.url, {"pruned": fake.url, "more": fake.url}, models=models)
    return {arm: endpoint.model for arm, endpoint in find_endpoints(settings).items()}


def test_of_several_models_none_is_taken_silently():
    with running(
        FakeServer(models=[{"id": "a"}, {"id": "b"}, {"id": "-c"}], prefix="/team")
    ) as fake:
        with pytest.raises(
            UserError, match="'a', 'b', '-c'; say with --dense-model which one is meant"
        ):
            found(fake, pruned="b", more="a")
        with pytest.raises(UserError, match="--pruned-model"):
            found(fake, dense="a", more="a")
        with pytest.raises(UserError, match=r"'d' is not served: .*--candidate-model more=MODEL"):
            found(fake, dense="a", pruned="b", more="d")
        assert found(fake, dense="a", pruned="b", more="-c") == {
            "dense": "a",
            "pruned": "b",
            "more": "-c",
        }
        fake.models = [{"id": "only"}]
        assert found(fake, more="only") == dict.fromkeys(("dense", "pruned", "more"), "only")


@pytest.mark.parametrize(
    "models", [[], None, {}, "x", [None], [{}], [{"id": None}], [{"id": ""}], [{"id": 3}]]
)
def test_a_list_without_models_is_refused(models):
    with (
        running(FakeServer(models=models)) as fake,
        pytest.raises(UserError, match="its list of models is"),
    ):
        found(fake)


@pytest.mark.parametrize("name", ["\x1b[31m", "a\0", "\ud800", "a\nb"])
def test_names_that_cannot_be_written_are_refused(name):
    message = re.escape(f"names that cannot be written: 'a', {name!r}")
    with (
        running(FakeServer(models=[{"id": "a"}, {"id": name}])) as fake,
        pytest.raises(UserError, match=message),
    ):
        found(fake)


def test_what_is_no_server_of_models_is_refused():
    with running(FakeServer(prefix="/team")) as fake:
        fake.url = fake.url.removesuffix("/team")
        with pytest.raises(
            UserError, match=r"does not answer as an OpenAI-compatible server: .*404"
        ):
            found(fake)


def told(tokens, started=1.5, model="fake"):
    labels = f'{{engine="0",model_name="{model}"}}'
    return (
        f"# a comment\nprocess_start_time_seconds {started}\nvllm:generation_tokens_total{labels} "
        f"{tokens}\n"
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (told(7.0), 7),
        (told("1.2e+06"), 1_200_000),
        (told(7) + 'vllm:generation_tokens_total{engine="1",model_name="fake"} 5', 12),
        (told(7) + told(5, model="other"), 7),
        (told(7, model="x") + told(5, model="y"), 12),
        ("vllm:generation_tokens_total 7 1700000000000", 7),
        *((told(number), None) for number in ("NaN", "+Inf", "-1", "many")),
        ("", None),
        ("other_total 3", None),
    ],
)
def test_what_is_no_count_is_not_told(text, tokens):
    with running(FakeServer(metrics=lambda: text)) as fake:
        counter = read_counter(Endpoint(fake.url, "fake"))
    assert (counter and counter.tokens) == tokens


def test_no_counts_and_slow_ones_are_not_told(monkeypatch):
    monkeypatch.setattr(counters, "METRICS_TIMEOUT_S", 0.2)

    def slow():
        time.sleep(1)
        return told(7)

    with running(FakeServer()) as silent, running(FakeServer(metrics=slow)) as late:
        assert read_counter(Endpoint(silent.url, "fake")) is None
        assert read_counter(Endpoint(late.url, "fake")) is None
    assert read_counter(Endpoint("http://127.0.0.1:9", "fake")) is None


@pytest.mark.parametrize(
    ("looks", "risen"),
    [
        ([told(10), told(20), told(30)], 20),  # it counts a moment later
        ([told(30)], 20),
        ([told(35)], 25),  # somebody else used it
        ([told(15)], 5),
        ([told(25), told(120)], None),  # two replicas, each with its own count
        ([told(120), told(25)], None),
        ([told(5)], None),
        ([told(30, started=2.5)], None),  # the other one, or a restart
        ([told("NaN")], None),
        ([""], None),
    ],
)
def test_replicas_that_count_apart_are_recognised(monkeypatch, looks, risen):
    monkeypatch.setattr(counters, "COUNTER_WAIT_S", 0.3)
    monkeypatch.setattr(counters, "POLL_S", 0.01)
    answers = cycle(looks) if risen is None else None
    number = count()

    def metrics():
        return next(answers) if answers else looks[min(next(number), len(looks) - 1)]

    with running(FakeServer(metrics=metrics)) as fake:
        assert (
            tokens_since(Endpoint(fake.url, "fake"), Counter(10, frozenset(["1.5"])), 20) == risen
        )
