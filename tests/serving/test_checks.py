"""What is refused before minutes are spent on a start, and what stands between vLLM and the
world."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from export.vllm_file import vllm_arguments
from gradmap.common.errors import UserError
from gradmap.common.files import sha256_file
from serving.cli import split_arguments
from serving.guard import Guard, guard_environment
from serving.identity import Identity, Trust, identify
from serving.launch import cache_share, memory_share
from serving.machine import bytes_in_memory, require_memory, suited_to_machine
from serving.proof import PASS_HEADER
from serving.settings import ServerSettings, build_command, server_environment
from tests.command_line import gradmap
from tests.export.sources import SHIFTED, export, make_source

GIB = 2**30


@pytest.fixture
def pico_artifact(picos, tmp_path):
    source = make_source(picos["llama"], removed=SHIFTED)
    return export(source, tmp_path / "out", "hf") and tmp_path / "out" / "hf"


def test_an_artifact_says_what_it_is(pico_artifact):
    identity = identify(pico_artifact, Trust())
    record = json.loads((pico_artifact / "gradmap.json").read_text())
    assert (identity.name, identity.layers) == (record["name"], record["layers"])
    assert list(identity.removed_layers) == record["plan"]["removal_order"] == ["M1+A2", 3]
    assert identity.plan_sha256 == record["plan"]["sha256"]
    assert len(identity.artifact_sha256) == 64


def test_a_flipped_byte_is_found_and_the_file_named(pico_artifact):
    weights = pico_artifact / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    finished = gradmap("serve", pico_artifact)
    assert finished.returncode == 2
    assert "model.safetensors is not what was exported" in finished.stderr
    identify(pico_artifact, Trust(verify=False))


def test_any_model_directory_can_be_served(picos):
    identity = identify(picos["llama"].directory, Trust())
    assert identity.name == "llama"
    assert identity.weight_bytes > 0
    assert identity.plan_sha256 is None


def test_what_must_be_an_artifact_is_no_other_directory(pico_artifact):
    """Whoever may change files may also remove the record that tells."""
    (pico_artifact / "gradmap.json").unlink()
    identify(pico_artifact, Trust())
    with pytest.raises(UserError, match=r"is no artifact \(it has no gradmap\.json\)"):
        identify(pico_artifact, Trust(artifact=True))
    finished = gradmap("serve", "--require-artifact", pico_artifact)
    assert finished.returncode == 2
    assert "is no artifact" in finished.stderr


def test_an_artifact_whose_hashes_were_made_anew_is_not_the_expected_one(pico_artifact):
    expected = sha256_file(pico_artifact / "gradmap.json")
    assert identify(pico_artifact, Trust(expected_sha256=expected)).artifact_sha256 == expected
    record = json.loads((pico_artifact / "gradmap.json").read_text())
    (pico_artifact / "LICENSE").write_text("another")
    record["files"]["LICENSE"] = sha256_file(pico_artifact / "LICENSE")
    (pico_artifact / "gradmap.json").write_text(json.dumps(record))
    identify(pico_artifact, Trust())
    finished = gradmap("serve", "--expect-sha256", expected, pico_artifact)
    assert finished.returncode == 2
    assert "gradmap.json is not the one that is expected" in finished.stderr


def test_an_artifact_cannot_have_code_run(pico_artifact):
    """Hashes made anew do not help: what would be run is refused for what it is."""
    (pico_artifact / "vllm.yaml").write_text("dtype: bfloat16\ntrust-remote-code: true\n")
    with pytest.raises(UserError, match=r"vllm\.yaml: trust-remote-code: this key is not known"):
        identify(pico_artifact, Trust(verify=False))
    (pico_artifact / "vllm.yaml").unlink()
    config = json.loads((pico_artifact / "config.json").read_text())
    (pico_artifact / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}})
    )
    with pytest.raises(UserError, match=r"config\.json names code to run \(auto_map\)"):
        identify(pico_artifact, Trust(verify=False))
    (pico_artifact / "config.json").write_text(json.dumps(config))
    (pico_artifact / "sub").mkdir()
    (pico_artifact / "sub" / "evil.py").write_text("print('ran')")
    with pytest.raises(UserError, match=r"evil\.py is a program"):
        identify(pico_artifact, Trust(verify=False))


@pytest.mark.parametrize(
    "contents",
    [
        "served-model-name: --enable-x",
        "dtype: [a]",
        "- a",
        "dtype: a",
        "middleware: x",
        "dtype: auto\ndtype: auto",
    ],
)
def test_an_artifact_tells_vllm_a_name_and_a_dtype_and_no_more(pico_artifact, contents):
    (pico_artifact / "vllm.yaml").write_text(contents)
    with pytest.raises(UserError, match=r"vllm\.yaml"):
        vllm_arguments(pico_artifact)


def test_an_artifact_for_another_runtime_is_refused(pico_artifact):
    record = json.loads((pico_artifact / "gradmap.json").read_text()) | {"format": "onnx"}
    (pico_artifact / "gradmap.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="use --format vllm"):
        identify(pico_artifact, Trust())


def test_memory_is_asked_for_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    settings, identity = ServerSettings(tmp_path), Identity("model", weight_bytes=4 * GIB)
    require_memory(settings, identity, 9 * GIB)
    with pytest.raises(
        UserError, match=r"about 9.0 GiB .*weights 4.0, KV cache 3.0.* 8.9 GiB are available; free"
    ):
        require_memory(settings, identity, int(8.9 * GIB))


def test_a_cpu_that_emulates_bfloat16_serves_in_float32_and_needs_the_memory_for_it(
    monkeypatch, tmp_path
):
    config = tmp_path / "config.json"
    identity = Identity("model", weight_bytes=4 * GIB)
    for emulates, dtype, flags in (
        (True, "bfloat16", ("--dtype", "float32")),
        (True, "bfloat16", ("--dtype=bfloat16",)),
        (False, "bfloat16", ()),
        (True, "float32", ("--dtype", "float32")),
    ):
        monkeypatch.setattr("serving.machine.cpu_wants_float32", lambda emulates=emulates: emulates)
        config.write_text(json.dumps({"dtype": dtype}))
        given = flags if "=" in "".join(flags) else ()
        settings = suited_to_machine(ServerSettings(tmp_path, vllm_flags=given))
        assert settings.vllm_flags == flags
        doubled = dtype == "bfloat16" and flags == ("--dtype", "float32")
        assert bytes_in_memory(settings, identity) == (8 if doubled else 4) * GIB
    config.write_text(json.dumps({"dtype": "bfloat16", "quantization_config": {"bits": 8}}))
    assert (
        bytes_in_memory(replace(settings, vllm_flags=("--dtype", "float32")), identity) == 4 * GIB
    )


def test_vllm_gets_no_more_cores_than_a_container_s_quota(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {7, 3, 5})
    for quota, cores in ((2, "3,5"), (3, None)):
        monkeypatch.setattr(
            "gradmap.runtimes.vllm_environment.usable_cores", lambda quota=quota: quota
        )
        environment = server_environment(ServerSettings(tmp_path))
        assert environment.get("VLLM_CPU_OMP_THREADS_BIND") == cores
    monkeypatch.setattr("gradmap.runtimes.vllm_environment.usable_cores", lambda: 2)
    parallel = ServerSettings(tmp_path, vllm_flags=("-tp", "2"))  # vLLM wants cores for each of two
    assert "VLLM_CPU_OMP_THREADS_BIND" not in server_environment(parallel)


def test_two_models_share_the_memory(monkeypatch):
    assert memory_share(2, True, ()) == ("--gpu-memory-utilization", "0.46")
    for given in ("--gpu-memory-utilization=0.3", "--gpu_memory_utilization=0.3", "--gpu-mem=0.3"):
        assert memory_share(2, True, (given,)) == ()
    assert memory_share(1, True, ()) == memory_share(2, False, ()) == ()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert cache_share(2) == {"VLLM_CPU_KVCACHE_SPACE": "1.5"}
    assert cache_share(1) == {}


def test_directories_come_before_vllms_flags():
    assert split_arguments(["a", "--x", "y"], 1) == (["a"], ("--x", "y"))
    assert split_arguments(["a", "b"], 2) == (["a", "b"], ())
    for arguments, count in ((["a"], 2), (["a", "b"], 1), (["--x"], 1)):
        with pytest.raises(UserError, match="vLLM's flags come after --"):
            split_arguments(arguments, count)


@pytest.mark.parametrize(
    "flag", ["--api-key=x", "--api_key", "--api-k", "--port", "--ssl_keyfile=x"]
)
def test_flags_that_would_leak_or_mislead_are_refused(flag):
    with pytest.raises(UserError, match=r"use --api-key-file|comes before --"):
        split_arguments(["a", flag, "1"], 1)


def test_an_empty_key_file_is_refused(picos, tmp_path):
    (tmp_path / "key").touch()
    finished = gradmap("serve", picos["llama"].directory, "--api-key-file", tmp_path / "key")
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
    assert "is empty; it should hold the API key" in finished.stderr


def guarded(monkeypatch, host):
    monkeypatch.setenv("GRADMAP_PASS", "open sesame")
    for name, value in guard_environment(
        ServerSettings(Path(), host), {"plan_sha256": "abc"}
    ).items():
        monkeypatch.setenv(name, value)
    routes = {
        "/v1/models": lambda request: JSONResponse({"data": [{"id": "m"}]}),
        "/health": lambda request: PlainTextResponse("fine"),
        "/metrics": lambda request: PlainTextResponse("numbers"),
    }
    return TestClient(
        Guard(Starlette(routes=[Route(path, answer) for path, answer in routes.items()]))
    )


def test_unguarded_routes_are_closed_on_public_addresses_only(monkeypatch):
    client = guarded(monkeypatch, "0.0.0.0")
    assert client.get("/health").text == "fine"
    assert client.get("/metrics").status_code == 404
    assert client.get("/metrics", headers={PASS_HEADER: "guess"}).status_code == 404
    assert client.get("/metrics", headers={PASS_HEADER: "open sesame"}).text == "numbers"
    assert client.get("/v1/models").json() == {
        "data": [{"id": "m", "gradmap": {"plan_sha256": "abc"}}]
    }
    monkeypatch.delenv("GRADMAP_CLOSED")
    assert guarded(monkeypatch, "127.0.0.1").get("/metrics").text == "numbers"


def test_tls_is_for_vllm_and_for_our_own_requests(picos, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=elsewhere"]
    files = ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run(["openssl", "req", "-x509", *options, *files], check=True, capture_output=True)
    settings = ServerSettings(
        picos["llama"].directory, "0.0.0.0", 8443, certificate=certificate, private_key=key
    )
    assert settings.url == "https://127.0.0.1:8443"
    command = build_command(settings)
    assert command[command.index("--ssl-certfile") + 1] == str(certificate)
    assert settings.client(1).base_url.scheme == "https"


def test_a_directory_that_is_gone_is_refused(picos, tmp_path):
    shutil.copytree(picos["llama"].directory, tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(UserError, match="no model directory"):
        identify(tmp_path / "model", Trust())
