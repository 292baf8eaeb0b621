"""Whatever is killed, nothing of the server outlives it, and the exit code says that it failed."""

import signal

import pytest

from tests.serving.endpoint import serving, still_running

pytestmark = [pytest.mark.alone, pytest.mark.slow]


def test_a_dead_api_server_without_restarts_is_a_failure(artifact, tmp_path):
    with serving(artifact, tmp_path, "--restarts", "0") as endpoint:
        endpoint.wait_until_ready()
        family = endpoint.family()
        next(
            process for process in family if "serving.vllm_server" in " ".join(process.cmdline())
        ).kill()
        assert endpoint.process.wait(30) == 1
        assert not still_running(family)
        assert "vLLM was killed by signal 9" in endpoint.messages.read_text()


def test_a_killed_supervisor_leaves_no_process(artifact, tmp_path):
    with serving(artifact, tmp_path) as endpoint:
        endpoint.wait_until_ready()
        family = endpoint.family()
        assert len(family) >= 3  # API server, engine, worker
        endpoint.process.send_signal(signal.SIGKILL)
        endpoint.process.wait()
        assert not still_running(family)
