"""Programs of ours run what is installed, wherever the user stands."""

import subprocess
from pathlib import Path

import pytest

from gradmap.common.children import module_command
from serving.settings import ServerSettings, build_command, server_environment

NAMES = ("gradmap", "export", "serving", "loadtest", "typer", "vllm")


@pytest.fixture
def strangers(tmp_path):
    """A directory with files and packages of our names."""
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('replaced')")
    (tmp_path / "torch.py").write_text("raise SystemExit('replaced')")
    return tmp_path


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("gradmap", "Usage: "),
        ("export.runners.run_transformers", "not enough values"),
        ("loadtest", "No module named"),
    ],
)
def test_no_file_of_the_working_directory_replaces_ours(strangers, module, says):
    command = module_command(module, *(["--help"] if module == "gradmap" else []))
    finished = subprocess.run(command, cwd=strangers, capture_output=True, text=True, check=False)
    assert says in finished.stdout + finished.stderr
    assert "replaced" not in finished.stderr


def test_nor_what_vllm_starts(strangers):
    settings = ServerSettings(Path("model"))
    assert build_command(settings)[:4] == module_command("serving.vllm_server")
    environment = server_environment(settings)
    # as vLLM asks for a model's class
    started = [*module_command("this")[:1], "-m", "vllm.version"]
    finished = subprocess.run(
        started, cwd=strangers, env=environment, capture_output=True, text=True, check=False
    )
    assert "replaced" not in finished.stderr
