"""What every client of a server does: straight to this machine, by proxy to others, with a key that
can be sent."""

import json

import httpx
import pytest

from gradmap.common.errors import UserError
from gradmap.common.loopback import is_own_address
from gradmap.evaluation import endpoint_backend
from gradmap.evaluation.endpoint_backend import EndpointBackend
from gradmap.runtimes.openai_api import authorization, open_client, served_model
from loadtest.counters import read_counter
from loadtest.endpoints import Endpoint


@pytest.fixture
def proxy(servers, monkeypatch):
    server = servers(b"of the proxy")
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, server.url)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return server


def test_this_machine_is_asked_without_a_proxy(servers, proxy):
    own = servers(b'{"data": [{"id": "m", "max_model_len": 9}]}')
    with open_client(own.url, 10) as client:
        assert served_model(client) == "m"
    assert EndpointBackend(own.url).model == "m"
    own.body = b"vllm:generation_tokens_total 7\n"
    assert read_counter(Endpoint(own.url, "m")).tokens == 7
    assert proxy.paths == []


def test_other_machines_are_asked_by_the_proxy(proxy):
    with open_client("http://elsewhere.example:8000", 10) as client:
        assert client.get("/v1/models").text == "of the proxy"
    assert proxy.paths == ["http://elsewhere.example:8000/v1/models"]


@pytest.fixture
def asked(monkeypatch):
    """What a server is asked that cuts answers after three tokens, as one with max_new_tokens
    does."""
    asked = []

    def answer(request):
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "max_model_len": 9}]})
        asked.append(json.loads(request.content))
        tokens = min(3, asked[-1]["max_tokens"])
        return httpx.Response(
            200, json={"choices": [{"finish_reason": "length", "token_ids": [7] * tokens}]}
        )

    def client(url, timeout_s):
        return httpx.Client(base_url=url, transport=httpx.MockTransport(answer))

    monkeypatch.setattr(endpoint_backend, "open_client", client)
    return asked


def test_a_server_answers_by_the_model_s_own_probabilities(asked):
    """It would take the penalties of generation_config.json where a request names none."""
    assert EndpointBackend("http://server").generate([[5, 6]], 3) == [[7, 7, 7]]
    neutral = {
        "temperature": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }
    assert asked[0].items() >= neutral.items()


def test_a_server_that_cuts_answers_is_refused(asked):
    with pytest.raises(UserError, match="cuts answers after 3 tokens, of 4 asked for"):
        EndpointBackend("http://server").generate([[5, 6]], 4)


def test_own_addresses_are_known():
    own = [
        "localhost",
        "a.localhost",
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "0:0:0:0:0:0:0:1",
        "::ffff:127.0.0.1",
        "0.0.0.0",
    ]
    assert [host for host in [*own, "::"] if not is_own_address(host)] == []
    others = ["example.com", "localhost.example.com", "10.0.0.1", "fd00::5", "::ffff:10.0.0.1"]
    assert [host for host in others if is_own_address(host)] == []


@pytest.mark.parametrize(
    "key", ["one\ntwo", "tab\there", "snow☃", "caf\u00e9", " edge", "edge\n", "nul\x7f", " "]
)
def test_a_key_that_no_header_carries_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(
        UserError, match="The API key in VLLM_API_KEY has characters that an HTTP header"
    ) as raised:
        authorization()
    assert key.strip() == "" or key.strip() not in str(raised.value)


def test_a_key_may_have_spaces_inside(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a key ~!")
    assert authorization() == {"Authorization": "Bearer a key ~!"}


@pytest.mark.parametrize("body", [b'{"data": []}', b"[]", b"{}", b"null"])
def test_a_server_without_a_model_is_told(servers, body):
    with (
        open_client(servers(body).url, 10) as client,
        pytest.raises(ValueError, match="its list of models is"),
    ):
        served_model(client)


def test_a_url_that_is_none_is_refused():
    with pytest.raises(UserError, match="is no valid URL"):
        open_client("http://127.0.0.1:port", 10)
