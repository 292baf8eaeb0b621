import sys
from pathlib import Path

import pytest

from serving import launch as launching
from serving import server
from serving.identity import Trust
from serving.launch import Launch
from serving.ports import free_port
from serving.settings import ServerSettings
from serving.supervisor import Policy
from tests.command_line import gradmap
from tests.conftest import BOOLQ, SMOLLM2, SMOLLM2_GGUF

STAND_IN = Path(__file__).parent / "stand_in.py"


@pytest.fixture
def stand_in(monkeypatch, picos, tmp_path):
    """Returns `launch(*arguments of the stand-in, policy)`, which returns a Launch of it."""

    def launch(*arguments, policy=None):
        def command(settings):
            return [sys.executable, str(STAND_IN), str(settings.port), *arguments]

        monkeypatch.setattr(server, "build_command", command)
        monkeypatch.setattr(launching, "require_gpus", lambda settings: ())
        port = free_port(in_a_row=3)  # of the model, of a second one, and for probes
        settings = ServerSettings(Path(), port=port, ready_timeout_s=30, drain_s=5)
        return Launch(
            [picos["llama"].directory],
            settings,
            policy or Policy(),
            "127.0.0.1",
            port + 2,
            [Trust()],
        )

    return launch


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """SmolLM2 without seven layers and a pair of sublayers, as exported for vLLM; unrepaired, for
    that takes minutes."""
    directory = tmp_path_factory.mktemp("served")
    model = ("--model", SMOLLM2, "--gguf-file", SMOLLM2_GGUF)
    choice = (
        "--selector",
        "manual",
        "--unit",
        "pair",
        "--layers",
        "12,13,14,15,16,17,18,M19+A20",
        "--compensator",
        "none",
        "--remove",
        "8",
    )
    calibration = ("--calibration", BOOLQ, "--samples", "4", "--tokens", "32")
    pruned = gradmap("prune", *model, *choice, *calibration, "--out", directory / "plan")
    assert pruned.returncode == 0, pruned.stderr
    target = ("--format", "vllm", "--no-check-vllm", "--out", directory)
    exported = gradmap("export", *model, "--plan", directory / "plan", *target)
    assert exported.returncode == 0, exported.stderr
    return directory / "vllm"
