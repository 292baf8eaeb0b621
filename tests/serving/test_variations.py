"""Other ways to use the real thing: over TLS, by vLLM's own load test, and two models at once."""

import re
import signal
import ssl
import subprocess

import httpx
import pytest

from benchmarks.serving_parity import OUTPUT_TOKENS, Target, measure_with_vllm
from loadtest.endpoints import Endpoint as LoadTestEndpoint
from tests.command_line import gradmap
from tests.conftest import SMOLLM2, SMOLLM2_GGUF
from tests.serving.endpoint import serving, still_running
from tests.serving.test_endpoint import MODEL

pytestmark = [pytest.mark.alone, pytest.mark.slow]


@pytest.fixture
def certificate(tmp_path):
    """Of this machine's loopback address, with its key beside it."""
    files = ["-out", str(tmp_path / "cert.pem"), "-keyout", str(tmp_path / "key.pem")]
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=gradmap", "-addext"]
    command = ["openssl", "req", "-x509", *options, "subjectAltName=IP:127.0.0.1", *files]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path / "cert.pem"


def test_it_serves_over_tls(artifact, tmp_path, certificate):
    options = [
        "--tls-certificate",
        str(certificate),
        "--tls-key",
        str(certificate.with_name("key.pem")),
    ]
    with serving(artifact, tmp_path, *options) as endpoint:
        endpoint.wait_until_ready()
        url = endpoint.url.replace("http://", "https://")
        trusting = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{url}/v1/models", verify=trusting).json()["data"][0]["id"] == MODEL
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/v1/models")
        endpoint.process.send_signal(signal.SIGTERM)
        assert endpoint.process.wait(60) == 0


def test_vllms_own_load_test_runs_against_it_until_ctrl_c(artifact, tmp_path):
    with serving(artifact, tmp_path) as endpoint:
        endpoint.wait_until_ready()
        target = Target(LoadTestEndpoint(endpoint.url, MODEL), artifact, requests=4)
        numbers = measure_with_vllm(target, concurrency=2, seed=1)
        assert 0 < numbers.tpot_ms < numbers.ttft_ms + OUTPUT_TOKENS * numbers.tpot_ms
        family = endpoint.family()
        endpoint.process.send_signal(signal.SIGINT)
        assert endpoint.process.wait(60) == 130
        assert not still_running(family)


def test_dense_and_pruned_are_served_at_once_and_end_together(artifact, tmp_path):
    model = ("--model", SMOLLM2, "--gguf-file", SMOLLM2_GGUF)
    exported = gradmap("export", *model, "--format", "vllm", "--no-check-vllm", "--out", tmp_path)
    assert exported.returncode == 0, exported.stderr
    with serving(tmp_path / "vllm", tmp_path, "--compare", str(artifact)) as endpoint:
        endpoint.wait_until_ready()
        first_port = int(endpoint.url.rpartition(":")[2])
        answers = {}
        for port in (first_port, first_port + 1):
            url = f"http://127.0.0.1:{port}/v1"
            (name,) = (one["id"] for one in httpx.get(f"{url}/models").json()["data"])
            request = {
                "model": name,
                "prompt": "The capital of France is",
                "max_tokens": 8,
                "temperature": 0,
            }
            answers[name] = httpx.post(f"{url}/completions", json=request, timeout=60).json()[
                "choices"
            ][0]["text"]
        assert (
            set(answers)
            == set(endpoint.state("readyz")[1])
            == {MODEL, MODEL.removesuffix("-minus-8")}
        )
        assert len(set(answers.values())) == 2
        metrics = httpx.get(f"{endpoint.admin}/metrics").text
        assert set(
            re.findall(r'vllm:generation_tokens_total\{.*model_name="([^"]+)"', metrics)
        ) == set(answers)
        family = endpoint.family()
        endpoint.process.send_signal(signal.SIGTERM)
        assert endpoint.process.wait(60) == 0
        assert not still_running(family)
