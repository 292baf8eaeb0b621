"""Runners of exported models, without the seconds that each takes to import what this process has
imported."""

import os
import sys
from importlib import import_module
from typing import Any

import pytest

from export import verification
from export.runners.probe_io import run
from gradmap.common.errors import UserError
from tests.conftest import ROOT

IMPORTED_HERE = ("export.runners.run_transformers", "export.runners.run_onnxruntime")
run_in_a_fresh_process = verification.run_child
QUALITY: dict[str, Any] = {
    "perplexity": {"squad": {"value": 12.5, "stderr": 0.5}},
    "accuracy": {"piqa": {"value": 0.625, "stderr": 0.011, "metric": "acc_norm"}},
    "segment": 128,
    "asked": {"piqa": "5-shot chat"},
}


def run_here(command, problem):
    """As `run_child`, for those runners that this process can run."""
    *python, module = command[:4]
    if python != [sys.executable, "-P", "-m"] or module not in IMPORTED_HERE:
        return run_in_a_fresh_process(command, problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[3:])
        try:
            run(import_module(module).outcome_of)
        except Exception as error:
            raise UserError(f"{problem}: {type(error).__name__}: {error}") from None


@pytest.fixture(scope="session", autouse=True)
def runners_in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "run_child", run_here)
        yield


@pytest.fixture
def fresh_processes(monkeypatch):
    """As users have it."""
    monkeypatch.setattr(verification, "run_child", run_in_a_fresh_process)


@pytest.fixture(scope="module")
def artifact(picos, tmp_path_factory):
    """An hf artifact of the Llama pico, its source and its gradmap.json."""
    from tests.export.sources import export, make_source

    out, source = tmp_path_factory.mktemp("artifact"), make_source(picos["llama"])
    return out / "hf", source, export(source, out, "hf", quality=QUALITY)["hf"]


def put_on_path(patch, environment):
    """As an environment that pipx or uv made would be."""
    programs = ROOT / f".venv-{environment}" / "bin"
    assert programs.exists(), f"run `make {environment}`"
    patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


@pytest.fixture
def compressor(monkeypatch):
    put_on_path(monkeypatch, "compressor")


@pytest.fixture
def llama_cpp(monkeypatch):
    put_on_path(monkeypatch, "consumers")
