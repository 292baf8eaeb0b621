"""The container files keep step with the code and with each other. What they build: `make
test-image`."""

import inspect
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from scripts.prove_image import read_instructions
from serving.admin import Admin
from serving.cli import serve
from serving.server import KILL_MARGIN_S
from serving.settings import ServerSettings
from tests.conftest import ROOT

BALANCER_WAIT_S = 5  # on a public address, see serving.cli
TARGETS = ("cpu", "cuda")


@pytest.fixture(scope="module")
def stages():
    """Instructions by target: word -> text, the last of each word."""
    found: dict[str, dict[str, str]] = {}
    name = ""
    for word, rest in read_instructions((ROOT / "Dockerfile").read_text()):
        if word == "FROM":
            name = rest.partition(" AS ")[2]
        found.setdefault(name, {})[word] = rest
    return found


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    finished = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_the_entry_point_is_the_command_line_as_it_is(stages, target):
    words = json.loads(stages[target]["ENTRYPOINT"]) + json.loads(stages[target]["CMD"])
    options = [word for word in words[: words.index("/model")] if word.startswith("--")]
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters}
    assert words[0] == "gradmap-serve"
    assert options
    assert set(options) <= known


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_nobody_and_is_healthy_when_it_answers(stages, target):
    assert int(stages[target]["USER"]) > 0
    port, route = re.search(r"127\.0\.0\.1:(\d+)/(\w+)", stages[target]["HEALTHCHECK"]).groups()
    assert stages[target]["EXPOSE"].split() == [str(ServerSettings(Path()).port), port]
    assert int(port) == ServerSettings(Path()).port + 1000
    assert route == Admin.readyz.__name__


@pytest.mark.parametrize("target", TARGETS)
def test_the_key_is_looked_for_where_it_is_documented_to_be(stages, compose, target):
    words = json.loads(stages[target]["ENTRYPOINT"])
    place = words[words.index("--api-key-file") + 1]
    assert f":{place}:ro" in (ROOT / "Dockerfile").read_text()
    assert "--allow-anonymous" not in words
    for service in ("dense", "pruned", "loadtest"):
        assert [f"/run/secrets/{name}" for name in compose["services"][service]["secrets"]] == [
            place
        ]
    assert compose["secrets"].keys() == {Path(place).name}
    assert place in " ".join(compose["services"]["loadtest"]["entrypoint"])


@pytest.mark.parametrize("target", TARGETS)
def test_the_health_check_asks_no_proxy(stages, target):
    command = json.loads(stages[target]["HEALTHCHECK"].partition("CMD ")[2])
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(503 if "not" in self.path else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        proxied = {**os.environ, "http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
        for path, code in (("readyz", 0), ("not-readyz", 1)):
            script = command[2].replace(":9000/readyz", f":{server.server_port}/{path}")
            finished = subprocess.run(
                [sys.executable, *command[1:2], script],
                env=proxied,
                capture_output=True,
                check=False,
            )
            assert finished.returncode == code
        server.shutdown()
    assert asked == ["/readyz", "/not-readyz"]


def test_what_is_copied_is_not_ignored(stages):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [
        source
        for word, rest in read_instructions((ROOT / "Dockerfile").read_text())
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert set(copied) == {line.removeprefix("!") for line in ignored if line.startswith("!")}


def test_what_is_installed_is_held_against_hashes():
    """All but torch, see the file; and it names no host, so that any index of packages will do."""
    text = (ROOT / "constraints" / "cpu.txt").read_text()
    pinned = re.findall(r"^[\w.-]+==\S+(?: \\\n +--hash=sha256:[0-9a-f]{64})*$", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert "\n".join(pinned).splitlines() == lines
    assert [one for one in pinned if "--hash" not in one] == ["torch==2.13.0"]


def test_containers_get_the_time_that_a_server_needs_to_stop(compose):
    for name in ("dense", "pruned"):
        grace_s = int(compose["services"][name]["stop_grace_period"].removesuffix("s"))
        assert grace_s >= BALANCER_WAIT_S + ServerSettings(Path()).drain_s + KILL_MARGIN_S


def test_grafana_asks_for_a_password_and_is_on_loopback(compose):
    grafana = compose["services"]["grafana"]
    assert grafana["environment"].keys() == {"GF_SECURITY_ADMIN_PASSWORD"}  # no anonymous access
    # `:?` in Compose: an empty one or none is an error
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?")
    assert [port.partition(":")[0] for port in grafana["ports"]] == ["127.0.0.1"]


def test_images_of_others_are_pinned_by_digest(compose, stages):
    images = [service["image"] for service in compose["services"].values()] + [
        stages["base"]["FROM"]
    ]
    others = [
        image.removesuffix(" AS base") for image in images if not image.startswith("gradmap:")
    ]
    assert len(others) == 3
    assert not [
        image for image in others if not re.fullmatch(r"[\w/]+:[\w.-]+@sha256:[0-9a-f]{64}", image)
    ]


def test_prometheus_and_grafana_find_their_files_and_targets(compose):
    services = compose["services"]
    for name in ("prometheus", "grafana"):
        for volume in services[name]["volumes"]:
            assert (ROOT / volume.partition(":")[0]).exists(), volume
    scraped = yaml.safe_load((ROOT / "deploy" / "compose" / "prometheus.yaml").read_text())[
        "scrape_configs"
    ]
    assert scraped[0]["static_configs"][0]["targets"] == ["dense:9000", "pruned:9000"]
    assert {"dense", "pruned"} <= services.keys()
