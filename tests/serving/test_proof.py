"""The key and the secret go to our own server only: not to a proxy, nor to who took its port."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serving import server
from serving.admin_port import serving_admin
from serving.guard import Guard
from serving.log import Log
from serving.ports import free_port
from serving.proof import CHALLENGE_HEADER, PASS_HEADER, PROOF_PATH, NotOursError, proof
from serving.server import Server, ServerError
from serving.settings import ServerSettings, server_environment
from tests.serving.conftest import STAND_IN

IMPOSTOR = b'{"data": [{"id": "impostor"}]}'


@pytest.fixture
def settings(picos, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hidden")
    return ServerSettings(picos["llama"].directory, port=free_port(), ready_timeout_s=30, drain_s=0)


def test_who_takes_the_port_gets_no_key_and_is_not_taken_for_the_server(
    settings, servers, monkeypatch, tmp_path
):
    settings = ServerSettings(settings.directory, port=settings.port, ready_timeout_s=2, drain_s=0)
    taken = []

    def command(_):  # after the port was found free
        taken.append(servers(IMPOSTOR, settings.port))
        return [sys.executable, "-c", "import time; time.sleep(600)"]

    monkeypatch.setattr(server, "build_command", command)
    with (
        pytest.raises(ServerError, match="did not complete a request"),
        Server(settings, Log(tmp_path / "log")) as one,
    ):
        one.wait_until_ready()
    requests = taken[0].requests
    assert {path for path, _ in requests} == {PROOF_PATH}
    for _, headers in requests:
        assert "hidden" not in str(headers)
        assert settings.secret not in str(headers)
    assert len({headers[CHALLENGE_HEADER] for _, headers in requests}) == len(requests)


def test_a_proxy_is_not_asked_for_the_own_server(settings, servers, monkeypatch, tmp_path):
    proxy = servers(IMPOSTOR)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        server, "build_command", lambda _: [sys.executable, str(STAND_IN), str(settings.port)]
    )
    with Server(settings, Log(tmp_path / "log")) as one:
        assert one.wait_until_ready() == "stand-in"
    assert proxy.requests == []


@pytest.fixture
def guarded(monkeypatch):
    """Settings of a server that is a guard, with one route behind it that tells what it was
    sent."""
    settings = ServerSettings(Path(), port=free_port())
    monkeypatch.setenv("GRADMAP_PASS", settings.secret)
    monkeypatch.setenv("VLLM_API_KEY", "hidden")

    def headers(request):
        return PlainTextResponse(
            f"{request.headers.get('Authorization')} {request.headers.get(PASS_HEADER)}"
        )

    # it only has to be an ASGI app
    guard: Any = Guard(Starlette(routes=[Route("/health", headers)]))
    with serving_admin(guard, settings.host, settings.port):
        yield settings


def test_the_guard_proves_who_it_is(guarded):
    with guarded.client(10) as client:
        assert client.get("/health").text == f"Bearer hidden {guarded.secret}"
    with replace(guarded, secret="another").client(10) as client, pytest.raises(NotOursError):
        client.get("/health")


def test_a_proof_tells_nothing_of_another(guarded):
    told = httpx.get(guarded.url + PROOF_PATH, headers={CHALLENGE_HEADER: "one"}).text
    assert told == proof(guarded.secret, "one") != proof(guarded.secret, "two")
    assert guarded.secret not in told


def test_without_a_secret_there_is_no_proof(monkeypatch):
    monkeypatch.delenv("GRADMAP_PASS", raising=False)
    assert TestClient(Guard(Starlette())).get(PROOF_PATH).status_code == 404


def test_the_secret_is_in_the_server_s_environment_and_nowhere_to_be_read(settings):
    assert server_environment(settings)["GRADMAP_PASS"] == settings.secret
    assert settings.secret not in repr(settings)
    assert settings.secret != ServerSettings(Path()).secret
