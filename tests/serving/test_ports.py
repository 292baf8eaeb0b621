"""Where is listened, and what is refused before anything starts."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from gradmap.common.errors import UserError
from serving import launch as launching
from serving import ports
from serving.cli import serve_until_stopped
from serving.launch import run
from serving.log import Log
from serving.options import ServeOptions
from serving.ports import bind, free_port, require_ports
from serving.settings import ServerSettings


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::0", "http://[::1]:8000"),
        ("0:0:0:0:0:0:0:0", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("fd00::5", "http://[fd00::5]:8000"),
        ("fe80::1%eth0", "http://[fe80::1%eth0]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_every_address_has_a_url(host, url):
    assert ServerSettings(Path(), host).url == url
    assert httpx.URL(url).port == 8000


@pytest.mark.parametrize("host", ["::", "::0", "0.0.0.0"])
def test_all_addresses_are_reached_by_loopback(host):
    with bind(host, 0, "--port") as listener:
        listener.listen()
        port = listener.getsockname()[1]
        url = httpx.URL(ServerSettings(Path(), host, port).url)
        socket.create_connection((url.host, url.port), timeout=10).close()


@pytest.mark.parametrize("port", [0, -1, 65536, 70000])
def test_a_port_that_does_not_exist_is_refused(port):
    with pytest.raises(UserError, match=rf"--port is {port}, and ports go from 1 to 65535"):
        require_ports({"--port": port})


def test_ports_at_the_ends_exist():
    require_ports({"--port": 1, "--admin-port": 65535})


@pytest.mark.parametrize(
    ("models", "port", "admin_port", "message"),
    [
        (1, 8000, 8000, "--port and --admin-port are both 8000"),
        (2, 8000, 8000, "--port and --admin-port are both 8000"),
        (2, 8000, 8001, r"--port \+ 1 and --admin-port are both 8001"),
        (2, 65535, 9000, r"--port \+ 1 is 65536"),
        (1, 64600, 65600, "--admin-port is 65600"),
        (1, 0, 1000, "--port is 0"),
    ],
)
def test_ports_are_checked_before_anything_else(
    stand_in, tmp_path, monkeypatch, models, port, admin_port, message
):
    monkeypatch.setattr(launching, "identify", lambda *_: pytest.fail("it began to hash"))
    launch = stand_in()
    settings = replace(launch.settings, port=port)
    launch = replace(
        launch, models=launch.models * models, settings=settings, admin_port=admin_port
    )
    with pytest.raises(UserError, match=message):
        run(launch, Log(tmp_path / "log"))
    assert not (tmp_path / "log").exists()


def test_a_second_server_leaves_the_first_one_s_log_alone(stand_in, tmp_path):
    launch = stand_in()
    (tmp_path / "log").write_text("of the first\n")
    (tmp_path / "log").chmod(0o640)
    with bind("127.0.0.1", launch.settings.port, "--port") as first:
        first.listen()
        with pytest.raises(UserError, match="Address already in use"):
            run(launch, Log(tmp_path / "log"))
    assert (tmp_path / "log").read_text() == "of the first\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o640


def test_chosen_ports_are_free_and_in_a_row(monkeypatch):
    first = free_port(in_a_row=3)
    monkeypatch.setattr(ports, "CHOSEN_PORTS", range(first, first + 2))
    with bind("127.0.0.1", first + 1, "--port") as taken:
        taken.listen()
        assert {free_port() for _ in range(20)} == {first}
        with pytest.raises(
            UserError, match=rf"^No loopback port from {first} to {first + 1} is free"
        ):
            free_port(in_a_row=2)
    assert free_port(in_a_row=2) in (first, first + 1)


@pytest.mark.parametrize("host", ["", "a..b", "no.such.host.invalid", "[::1]"])
def test_a_host_that_is_none_is_refused(host):
    with pytest.raises(UserError, match=r"^(Cannot listen on|The host is empty)"):
        bind(host, 1024, "--port")


@pytest.fixture
def no_key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "myhost"])
def test_a_public_address_without_a_key_takes_consent(no_key, host):
    with pytest.raises(
        UserError, match=r"no key is asked for; give --api-key-file, or --allow-anonymous"
    ):
        serve_until_stopped(["model"], ServeOptions(host=host))


def consented(monkeypatch, **options):
    """Whether `serve` goes on to launch."""
    launched = []
    monkeypatch.setattr(launching, "run", lambda launch, log: launched.append(launch) or 0)
    assert serve_until_stopped(["model"], ServeOptions(log="-", **options)) == 0
    return bool(launched)


def test_consent_or_a_key_or_loopback_will_do(no_key, monkeypatch, tmp_path):
    missing, key = tmp_path / "missing", tmp_path / "key"
    key.write_text("secret\n")
    assert consented(monkeypatch, host="0.0.0.0", allow_anonymous=True)
    assert consented(monkeypatch, host="0.0.0.0", allow_anonymous=True, api_key_file=missing)
    assert consented(monkeypatch, host="127.0.0.1")
    with pytest.raises(UserError, match="missing does not exist"):
        serve_until_stopped(["model"], ServeOptions(host="0.0.0.0", api_key_file=missing))
    assert consented(monkeypatch, host="0.0.0.0", api_key_file=key)
    assert os.environ["VLLM_API_KEY"] == "secret"
    assert consented(monkeypatch, host="0.0.0.0", api_key_file=missing)


@pytest.mark.parametrize("content", ["one\ntwo", "caf\u00e9", "bell\a", "snow☃"])
def test_a_key_file_that_no_header_carries_is_refused(no_key, tmp_path, content):
    (tmp_path / "key").write_text(content)
    with pytest.raises(
        UserError, match=r"The API key in .*key has characters that an HTTP header cannot carry"
    ):
        serve_until_stopped(["model"], ServeOptions(api_key_file=tmp_path / "key"))


def test_the_command_line_knows_the_flag(picos):
    command = [
        sys.executable,
        "-c",
        "from serving.cli import main; main()",
        str(picos["llama"].directory),
    ]
    options = ["--host", "0.0.0.0", "--port", "70000", "--allow-anonymous"]
    finished = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert (
        finished.stderr == "Error: --port is 70000, and ports go from 1 to 65535; choose another.\n"
    )
