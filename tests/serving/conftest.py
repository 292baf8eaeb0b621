import pytest

from tests.command_line import gradmap
from tests.conftest import BOOLQ, SMOLLM2, SMOLLM2_GGUF


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """SmolLM2 without eight layers, as exported for vLLM; unrepaired, for that takes minutes."""
    directory = tmp_path_factory.mktemp("served")
    model = ("--model", SMOLLM2, "--gguf-file", SMOLLM2_GGUF)
    choice = ("--selector", "manual", "--layers", "12,13,14,15,16,17,18,19", "--compensator", "none", "--remove", "8")
    calibration = ("--calibration", BOOLQ, "--samples", "4", "--tokens", "32")
    pruned = gradmap("prune", *model, *choice, *calibration, "--out", directory / "plan")
    assert pruned.returncode == 0, pruned.stderr
    target = ("--format", "vllm", "--no-check-vllm", "--out", directory)
    exported = gradmap("export", *model, "--plan", directory / "plan", *target)
    assert exported.returncode == 0, exported.stderr
    return directory / "vllm"
