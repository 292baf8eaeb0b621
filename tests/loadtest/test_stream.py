"""What servers stream, as they do: how they count, how they fail, and how their events are
written."""

import json
from itertools import count

import pytest

from loadtest.driver.completions import connect, stream_completion
from loadtest.driver.stream import (
    KEPT_CHARACTERS,
    Stream,
    StreamError,
    server_sent_events,
    shortened,
    whole_number,
)
from loadtest.metrics import measure
from loadtest.records import Cell
from loadtest.workload import CompletionRequest
from tests.loadtest.fake_server import FakeServer, running

TOKENS = 4


def event(text="x", usage=None, last=False, **choice):
    return {
        "choices": [{"text": text, "finish_reason": "length" if last else None, **choice}],
        "usage": usage,
    }


def counted(number):
    return {"completion_tokens": number}


SUM = {"choices": [], "usage": counted(TOKENS)}
COUNTS = {
    "in every event": [event(usage=counted(number)) for number in (1, 2, 3, 4)],
    "in every event, a token decodes to nothing": [
        event(text, counted(n)) for n, text in enumerate(("", *"abc"), 1)
    ],
    "in every event and at the end": [
        *(event(usage=counted(number)) for number in (1, 2, 3, 4)),
        SUM,
    ],
    "as 4.0": [event(usage=counted(float(number))) for number in (1, 2, 3, 4)],
    "at the end": [*[event()] * 4, SUM],
    "at the end, a token decodes to nothing": [event(""), event("a"), event(""), event("b"), SUM],
    "in the last event, which has no token": [
        *[event()] * 4,
        event("", counted(TOKENS), last=True),
    ],
    "in the last event, which has one": [*[event()] * 3, event("x", counted(TOKENS), last=True)],
    "by token ids": [*[event(token_ids=[7])] * 4, SUM],
    "by log-probabilities": [*[event(logprobs={"tokens": ["x"]})] * 4, SUM],
    "by token ids alone": [event(token_ids=[7])] * 4,
}


def streamed(events):
    stream = Stream()
    for arrived_s, one in enumerate(events):
        stream.note(one, float(arrived_s))
    return stream.arrivals()


@pytest.mark.parametrize("way", COUNTS)
def test_tokens_are_counted_however_a_server_tells(way):
    assert streamed(COUNTS[way]) == [(0.0, 1), (1.0, 2), (2.0, 3), (3.0, 4)]


@pytest.mark.parametrize(
    "events",
    [
        [event("abcd", counted(4)), *(event(usage=counted(number)) for number in (5, 6, 7, 8))],
        [
            event("abcd", token_ids=[1, 2, 3, 4]),
            *[event(token_ids=[5])] * 4,
            {"choices": [], "usage": counted(8)},
        ],
        [
            event("abcd", logprobs={"tokens": list("abcd")}),
            *[event(logprobs={"tokens": ["x"]})] * 4,
        ],
    ],
)
def test_a_first_chunk_of_several_tokens_is_counted_as_such(events):
    assert [tokens for _, tokens in streamed(events)] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (
            [event("abcd"), *[event()] * 4, {"choices": [], "usage": counted(8)}],
            "8 tokens came in 5 chunks, and the",
        ),
        ([event()] * 4, "does not count its tokens"),
        ([event(usage=counted(2)), event(usage=counted(1))], "counted 1 tokens after 2"),
        (
            [*[event(token_ids=[7])] * 3, SUM],
            "the chunks brought 3 tokens, and the server counted 4",
        ),
        *(
            ([event(usage=counted(number))], "which is no count")
            for number in (1.5, -1, "3", True, float("nan"), float("inf"), 1e300, [1], 10**400)
        ),
        (["text"], 'sent "text" as an event'),
        ([None], "sent null as an event"),
    ],
)
def test_counts_that_nobody_can_know_are_refused(events, message):
    with pytest.raises(StreamError, match=message):
        streamed(events)


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "out of memory", "code": 500}},
        {"error": "out of memory"},
        {"object": "error", "message": "out of memory"},
    ],
)
@pytest.mark.parametrize("before", [0, 1, 4])
def test_an_error_fails_the_request_whenever_it_comes(error, before):
    with pytest.raises(StreamError, match=r"^the server said: out of memory$"):
        streamed([*COUNTS["in every event"][:before], error])


def test_events_without_an_error_are_none():
    assert streamed([event(usage=counted(1)) | {"error": None}, {}, {"choices": None}]) == [
        (0.0, 1)
    ]


@pytest.mark.parametrize(
    ("written", "events"),
    [
        (b"data: {}\n\ndata: [DONE]\n\n", ["{}", "[DONE]"]),
        (b"data:{}\n\n", ["{}"]),
        (b"data:  {}\n\n", [" {}"]),
        (b"data: {}\r\n\r\n", ["{}"]),
        (b'data: {"a":\ndata: 1}\n\n', ['{"a":\n1}']),
        (b": a comment\nevent: x\nid: 1\nretry: 3\ndata: {}\n\n\n\n", ["{}"]),
        (b"data\ndata: 1\n\n", ["\n1"]),
        (b"data: 1", ["1"]),
        (b'{"not": "an event"}\n', []),
        (b"data: \xff\n\n", ["\ufffd"]),
        (b"", []),
    ],
)
def test_events_are_read_as_their_standard_says(written, events):
    lines = iter([*written.splitlines(keepends=True), b""])
    assert list(server_sent_events(lambda: next(lines))) == events


def test_whole_numbers():
    assert [whole_number(value) for value in (0, 3, 3.0)] == [0, 3, 3]


def test_what_a_server_says_is_shortened_to_one_line():
    assert shortened("a\x1b[31m\r\nb\u2028c\ud800\x00 d") == "a [31m b c d"
    assert len(shortened("x" * 10**6)) == KEPT_CHARACTERS


NUMBERS = count(1)


def completed(fake, reply=None, status=200):
    """The record of one request to a running fake."""
    prompt = next(NUMBERS)
    if reply is not None:
        fake.faults[prompt] = reply
    client = connect(fake.url, "fake", 1, 10.0)
    try:
        return stream_completion(
            client, CompletionRequest("one", (prompt,), TOKENS), Cell("dense", 0, "load"), None
        )
    finally:
        client.http.close()


def as_events(events):
    return "".join(f"data: {json.dumps(one)}\n\n" for one in events).encode()


ONE_OVER_LINES = b'data:{"choices": [{"text": "x"}],\ndata: "usage": {"completion_tokens": 4}}\n\n'


def test_requests_fail_with_what_the_server_said():
    vllm = {
        "error": {
            "message": "This model's maximum context length is 64 tokens.",
            "type": "BadRequestError",
        }
    }
    replies = {
        json.dumps(vllm).encode(): (
            "no stream of events came, but: This model's maximum context length is 64 tokens."
        ),
        b"<html>Log in</html>": "no stream of events came, but: <html>Log in</html>",
        b"": "no stream of events came, but: ",
        as_events(
            [*COUNTS["in every event"], vllm]
        ): "the server said: This model's maximum context length is 64 tokens.",
        b"data: oops\n\n": "the server sent oops as an event",
        as_events(COUNTS["in every event"][:3]): "3 tokens came, 4 were asked for",
        as_events(
            COUNTS["at the end"][:3]
        ): "the server does not count its tokens; it needs stream_options.include_usage",
    }
    with running(FakeServer()) as fake:
        for reply, error in replies.items():
            record = completed(fake, reply)
            assert record.error == error.strip() or record.error == error
        for reply in (as_events(COUNTS["at the end"]), ONE_OVER_LINES, None):
            record = completed(fake, reply)
            assert (record.error, record.completion_tokens) == (None, 4)


def test_the_start_of_an_errors_body_is_kept(monkeypatch):
    bodies = {
        b'{"error": {"message": "the context length is 64"}}': "HTTP 400: the context length is 64",
        b'{"object": "error", "message": "no such model"}': "HTTP 400: no such model",
        b'{"detail": "Not Found"}': "HTTP 400: Not Found",
        b"upstream\nis away": "HTTP 400: upstream is away",
        b"": "HTTP 400",
        b"\xff\x00" * 10**5: "HTTP 400: ",
    }
    with running(FakeServer()) as fake:
        for body, error in bodies.items():

            def refuse(handler, _, body=body):
                handler.send_response(400)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            monkeypatch.setattr(fake, "answer", refuse)
            record = completed(fake)
            assert record.error.startswith(error)
            assert len(record.error) <= KEPT_CHARACTERS + len("HTTP 400: ")


@pytest.mark.parametrize(
    ("prefix", "written"), [("", "/v1"), ("/team-a", ""), ("/team-a", "/v1/"), ("/a/b", "/")]
)
def test_a_prefix_of_the_path_is_kept(prefix, written):
    with running(FakeServer(prefix=prefix)) as fake:
        fake.url += written
        record = completed(fake)
    assert (record.error, record.completion_tokens) == (None, 4)
    assert measure(record).ttft_s > 0
