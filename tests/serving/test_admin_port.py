"""No client holds up the admin port, or its end."""

import socket

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from gradmap.common.errors import UserError
from serving import admin_port
from serving.admin_port import serving_admin
from serving.ports import free_port

APP = Starlette(routes=[Route("/livez", lambda request: PlainTextResponse("alive"))])


@pytest.mark.parametrize(
    "sent", [b"", b"G", b"GET /livez HTTP/1.1\r\nHost:", b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"]
)
def test_a_client_that_sends_too_little_is_sent_away(monkeypatch, sent):
    monkeypatch.setattr(admin_port, "ANSWER_TIMEOUT_S", 0.3)
    port = free_port()
    with (
        serving_admin(APP, "127.0.0.1", port),
        socket.create_connection(("127.0.0.1", port), timeout=60) as client,
    ):
        client.sendall(sent)
        assert httpx.get(f"http://127.0.0.1:{port}/livez").text == "alive"
        try:
            while client.recv(4096):  # until it is closed, or reset
                pass
        except ConnectionResetError:
            pass


def test_the_port_closes_while_a_client_waits():
    port = free_port()
    with socket.socket() as client:
        with serving_admin(APP, "127.0.0.1", port):
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /liv")
            assert httpx.get(f"http://127.0.0.1:{port}/livez").text == "alive"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/livez")


def test_a_kept_connection_may_ask_again():
    port = free_port()
    with (
        serving_admin(APP, "127.0.0.1", port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        assert [client.get("/livez").text for _ in range(3)] == ["alive"] * 3


def test_a_port_that_was_taken_meanwhile_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        admin = serving_admin(APP, "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(UserError, match="choose another with --admin-port"), admin:
            pass
