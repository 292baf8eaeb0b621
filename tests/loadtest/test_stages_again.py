"""A stage runs again exactly when its result, or something it depends on, has changed."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from gradmap.common.files import write_json, write_text
from gradmap.common.stages import STAGES_DIRECTORY, is_done, stage_key
from gradmap.common.verdict import EXIT_CODES, Verdict
from loadtest.options import REQUIRED_SPEED_UP
from loadtest.outcome import write_all
from loadtest.pipeline import run as pipeline
from loadtest.pipeline.recipe import load_recipe
from loadtest.pipeline.run import judge_as_asked, run_recipe
from loadtest.pipeline.stages import plan_stages
from loadtest.records import append_measurements
from tests.command_line import gradmap
from tests.loadtest.measurements import measured
from tests.loadtest.recipes import NAMES, finish
from tests.loadtest.test_page import make_report


def undone(recipe_file, out):
    return [
        stage.name
        for stage in plan_stages(load_recipe(recipe_file), out)
        if not is_done(stage, out)
    ]


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def lose(path):
    path.unlink() if path.is_file() else shutil.rmtree(path)


@pytest.mark.parametrize("damage", [flip, lose])
@pytest.mark.parametrize(
    ("path", "again"),
    [
        ("vllm/gradmap.json", ["export", "loadtest"]),
        ("hf/weights/model.safetensors", ["export"]),
        ("dense/vllm/gradmap.json", ["baseline", "loadtest"]),
        ("eval.json", ["eval", "export", "baseline"]),
        ("eval.records.jsonl", ["eval"]),
        ("loadtest/report.json", ["loadtest"]),
    ],
)
def test_a_stage_whose_result_was_changed_or_is_incomplete_runs_again(
    recipe_file, tmp_path, damage, path, again
):
    out = tmp_path / "out"
    write_text(out / "hf" / "weights" / "model.safetensors", "weights")
    finish(recipe_file, out, *NAMES)
    damage(out / path)
    assert undone(recipe_file, out) == again


@pytest.fixture
def measured_run(recipe_file, tmp_path):
    """A run that is done, with a load test that can be drawn again; the recipe's gate is the
    default one."""
    out = tmp_path / "out"
    report, records = make_report(required=REQUIRED_SPEED_UP)
    append_measurements(out / "loadtest", measured(records))
    write_all(out / "loadtest", report, records)
    finish(recipe_file, out, *NAMES, keep=out / "loadtest")
    return out


def test_a_report_that_is_drawn_again_leaves_the_load_test_done(
    recipe_file, measured_run, monkeypatch
):
    left = (measured_run / "loadtest" / "report.json").read_bytes()
    drawn = gradmap("report", measured_run / "loadtest", "--require-speedup", 100, "--parquet")
    assert drawn.returncode == EXIT_CODES[Verdict.FAIL], drawn.stderr
    assert (measured_run / "loadtest" / "report.json").read_bytes() != left
    assert undone(recipe_file, measured_run) == []
    # which comes when all stages are done
    monkeypatch.setattr(pipeline, "write_report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_recipe(recipe_file, measured_run, None, False)
    assert (measured_run / "loadtest" / "report.json").read_bytes() == left


def test_a_run_judges_its_load_test_by_the_gate_of_the_recipe(recipe_file, measured_run):
    recipe_file.write_text(recipe_file.read_text() + "loadtest: {require_speedup: 100}")
    judge_as_asked(load_recipe(recipe_file), measured_run)
    report = json.loads((measured_run / "loadtest" / "report.json").read_text())
    assert (report["required_speedup"], report["verdict"]) == (100, "FAIL")


@pytest.mark.parametrize("name", ["records.jsonl", "blocks.jsonl"])
def test_what_was_measured_and_changed_is_measured_again(recipe_file, measured_run, name):
    flip(measured_run / "loadtest" / name)
    assert undone(recipe_file, measured_run) == ["loadtest"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("environment", {}), ("settings", {}), ("weight_bytes", {}), ("prompts", None)],
)
def test_facts_that_only_the_report_has_may_not_change(recipe_file, measured_run, key, value):
    path = measured_run / "loadtest" / "report.json"
    write_json(path, json.loads(path.read_text()) | {key: value})
    assert undone(recipe_file, measured_run) == ["loadtest"]


def test_a_directory_that_is_gone_is_made_again(recipe_file, tmp_path):
    finish(recipe_file, tmp_path / "out", *NAMES)
    lose(tmp_path / "out" / "hf")
    assert undone(recipe_file, tmp_path / "out") == ["export"]


def test_results_out_of_a_cache_have_other_times_and_are_taken(recipe_file, tmp_path):
    out = tmp_path / "out"
    finish(recipe_file, out, *NAMES)
    for path in out.rglob("*"):
        os.utime(path, (1, 1))
    assert undone(recipe_file, out) == []
    (out / "hf" / "gradmap.json").write_text("[]")  # as long as before
    assert undone(recipe_file, out) == ["export"]


@pytest.mark.parametrize(
    "marker", ['{"key": "other"}', "{", "[]", '"key"', '{"outputs": {}}', "null"]
)
def test_a_marker_that_does_not_say_what_was_written_is_not_taken(recipe_file, tmp_path, marker):
    out = tmp_path / "out"
    finish(recipe_file, out, *NAMES)
    (out / STAGES_DIRECTORY / "loadtest.json").write_text(marker)
    assert undone(recipe_file, out) == ["loadtest"]


def test_a_marker_without_its_outputs_is_not_taken(recipe_file, tmp_path):
    out = tmp_path / "out"
    finish(recipe_file, out, *NAMES)
    marker = out / STAGES_DIRECTORY / "eval.json"
    record = json.loads(marker.read_text())
    del record["outputs"]
    write_json(marker, record)
    assert undone(recipe_file, out) == ["eval"]


def test_a_stage_whose_output_is_of_an_older_format_runs_again(recipe_file, tmp_path):
    evaluation = plan_stages(load_recipe(recipe_file), tmp_path)[1]
    older = replace(evaluation, schema=evaluation.schema - 1)
    assert stage_key(older) != stage_key(evaluation)
    assert stage_key(replace(evaluation)) == stage_key(evaluation)
