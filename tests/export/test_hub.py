"""Uploading to a hub: a small server stands in for it; the client is the real huggingface_hub, in
its own process."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from export.hub import check_hub_access
from export.integrity import SCHEMA_VERSION, ArtifactRecord, BaseRecord
from gradmap.common.errors import UserError

TOKEN = "hf_secret"
COMMIT = "0123456789" * 4
PUSH = """
import sys
from pathlib import Path
from export.hub import check_hub_access, push
from gradmap.common.errors import UserError
try:
    check_hub_access(sys.argv[2])
    print(push(Path(sys.argv[1]), sys.argv[2]))
except UserError as error:
    print("REFUSED", error)
"""


@dataclass
class FakeHub:
    """Answers the routes of an upload; `files` holds what was committed. refuse: path part -> HTTP
    status."""

    refuse: dict[str, int] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    created: list[dict] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def answer(self, path: str, body: bytes) -> tuple[int, dict]:
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": "no"}
        if "/repos/create" in path:
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.url}/me/model"}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return 200, {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in asked
                ]
            }
        if "/commit/" in path:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return 200, {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.url}/me/model/commit/{COMMIT}",
            }
        return 200, {"name": "me", "type": "user", "id": "me/model", "sha": COMMIT, "siblings": []}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "/api/" in self.path and "harness" not in self.path:
                fake.tokens.add(self.headers.get("Authorization"))
            status, answer = fake.answer(self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer  # noqa: N815 - the base class's names

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture
def artifact(tmp_path):
    directory = tmp_path / "artifact"
    directory.mkdir()
    for name, content in {
        "config.json": "{}",
        "model.safetensors": "weights",
        "stray.txt": "private",
    }.items():
        (directory / name).write_text(content)
    record = ArtifactRecord(
        schema_version=SCHEMA_VERSION,
        name="pico",
        format="hf",
        dtype="keep",
        quantise=None,
        calibration=None,
        layers=1,
        parameters=1,
        weight_bytes=7,
        base_model=BaseRecord(name="base", files={}, license=None),
        plan=None,
        verification={},
        environment={},
        files={"config.json": "-", "model.safetensors": "-"},
    )
    (directory / "gradmap.json").write_text(record.model_dump_json())
    return directory


def push(artifact, url, repo_id="me/model", token=TOKEN):
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(artifact.parent / "home"),
    }
    environment.pop("HF_TOKEN", None)
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-c", PUSH, str(artifact), repo_id]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert TOKEN not in finished.stdout + finished.stderr
    return finished.stdout.strip()


def test_exactly_the_artifact_arrives_in_a_private_repository(hub, artifact):
    assert push(artifact, hub.url) == f"{hub.url}/me/model/commit/{COMMIT}"
    expected = {
        name: (artifact / name).read_bytes()
        for name in ("config.json", "model.safetensors", "gradmap.json")
    }
    assert hub.files == expected
    assert hub.created[0]["visibility"] == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        ({"whoami": 401}, "does not accept the token"),
        ({"create": 403, "upload": 403}, "may not write to me/model"),
        ({"commit": 413}, "HTTP 413"),
    ],
)
def test_a_refusal_is_explained(hub, artifact, refuse, message):
    hub.refuse = refuse
    answer = push(artifact, hub.url)
    assert answer.startswith("REFUSED")
    assert message in answer
    assert len(answer.splitlines()) == 1


def test_a_missing_token_is_explained(hub, artifact):
    assert "set HF_TOKEN" in push(artifact, hub.url, token=None)


@pytest.mark.parametrize("name", ["just-a-name", "a/b/c"])
def test_a_name_that_is_no_repository_is_explained(name):
    with pytest.raises(UserError, match="owner/name"):
        check_hub_access(name)
