"""The way from a model to a served artifact on a CPU that emulates bfloat16, which most laptops
have, on any CPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import BOOLQ, SMOLLM2, SMOLLM2_GGUF, SQUAD
from tests.gradmap.common.test_machine import WITHOUT_BFLOAT16

pytestmark = pytest.mark.alone

MODEL = ("--model", SMOLLM2, "--gguf-file", SMOLLM2_GGUF)


def gradmap_without_bfloat16(*arguments):
    """In a process of its own: what the CPU is asked for is read when torch is imported."""
    command = [sys.executable, "-m", "gradmap", *map(str, arguments)]
    environment = {**os.environ, **WITHOUT_BFLOAT16}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def test_a_model_is_pruned_evaluated_and_exported_in_float32(tmp_path):
    plan, out = tmp_path / "plan", tmp_path / "artifacts"
    few = ("--samples", 8, "--tokens", 32, "--one-shot", "--compensator", "refit")
    pruned = gradmap_without_bfloat16(
        "prune", *MODEL, "--remove", 2, "--calibration", BOOLQ, *few, "--out", plan
    )
    assert "Computing in float32 (found: float32" in pruned.stderr
    contents = json.loads((plan / "plan.json").read_text())
    assert (contents["recipe"]["dtype"], contents["environment"]["dtype"]) == ("auto", "float32")

    text = ("--perplexity", f"squad={SQUAD}", "--limit", 4)
    gradmap_without_bfloat16("eval", *MODEL, "--plan", plan, *text, "--out", tmp_path / "eval.json")
    evaluation = json.loads((tmp_path / "eval.json").read_text())
    assert evaluation["dense"]["dtype"] == evaluation["pruned"]["dtype"] == "float32"
    # of 4 segments; 100 segments give 31
    assert 20 < evaluation["dense"]["perplexity"]["squad"]["value"] < 80

    gradmap_without_bfloat16("export", *MODEL, "--plan", plan, "--format", "vllm", "--out", out)
    record = json.loads((out / "vllm" / "gradmap.json").read_text())
    assert record["dtype"] == "bfloat16"  # what is stored
    assert record["verification"]["vllm"]["runtime"].endswith("float32")  # what vLLM computed in
