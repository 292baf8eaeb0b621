"""The drill, on a pico shape."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import typer

from benchmarks import llama_7b
from benchmarks.llama_7b_steps import STEPS, Task
from gradmap.costs.steps import CalibrationSize
from tests.conftest import ROOT
from tests.gradmap.removals import pairs

SMALL: dict[str, Any] = {"shape": "pico", "samples": 4, "tokens": 8, "serve": False}


def drill(out, **changes):
    """The steps that are on record behind it."""
    llama_7b.main(out=out, **SMALL | changes)
    return json.loads(out.read_text())["steps"]


def test_a_step_that_fails_spoils_no_other_and_is_all_that_is_done_again(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "drill.json"

    def fail(*args):
        assert {"gradient scores", "the default's selection", "refit"} <= json.loads(
            out.read_text()
        )["steps"].keys()
        raise MemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises(typer.Exit):
        patch.setitem(STEPS, "writing", replace(STEPS["writing"], run=fail))
        drill(out)
    first = json.loads(out.read_text())["steps"]
    assert first.pop("writing") == {"error": "MemoryError: no room"}
    assert first.keys() == STEPS.keys() - {"writing"} | {llama_7b.PROFILE}
    assert all(facts["seconds"] > 0 for facts in first.values())
    assert sorted(
        len(first[name]["removed"]) for name in ("gradient scores", "the default's selection")
    ) == [2, 2]
    slowest = first[llama_7b.PROFILE]
    assert (
        slowest["step"] in STEPS
        and "aten::mm" in slowest["device"]
        and "aten::mm" in slowest["cpu"]
    )
    assert "failed" in capsys.readouterr().out

    second = drill(out)
    assert second.pop("writing")["seconds"] > 0
    assert second == first

    monkeypatch.setattr(llama_7b, "make_case", None)  # nothing is left to be made for
    whole = out.read_text()
    assert drill(out) == json.loads(whole)["steps"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in STEPS) and "failed" not in printed


def test_no_step_is_begun_once_the_minutes_are_over(tmp_path, capsys):
    steps = drill(tmp_path / "drill.json", minutes=0)
    assert steps.keys() == STEPS.keys() | {llama_7b.PROFILE}
    assert all(facts == {"not_begun": "the minutes were over"} for facts in steps.values())
    assert capsys.readouterr().out.count("not begun") == len(STEPS)


def test_results_of_another_size_or_machine_are_not_mixed(tmp_path, monkeypatch):
    out = tmp_path / "drill.json"
    drill(out, minutes=0)
    with pytest.raises(typer.BadParameter, match="'tokens': 8"):
        drill(out, minutes=0, tokens=9)
    monkeypatch.setattr(llama_7b, "machine", lambda: "1 x another GPU")
    with pytest.raises(typer.BadParameter, match="another GPU"):
        drill(out, minutes=0)


def test_serving_needs_its_texts_and_the_shape_that_is_served(tmp_path):
    with pytest.raises(typer.BadParameter, match="needs --tokenizer and --calibration"):
        drill(tmp_path / "drill.json", serve=True)
    with pytest.raises(typer.BadParameter, match="Llama-2-7B's shape"):
        drill(tmp_path / "drill.json", serve=True, tokenizer=tmp_path, calibration="file:texts.txt")


def test_layers_go_in_as_many_runs_as_predictions_have_it():
    for shape in llama_7b.KNOWN_SHAPES.values():
        task = Task(shape, CalibrationSize())
        assert len(set(task.removed)) == task.remove == max(1, round(shape.layers / 4))
        removed = [pair.first.layer for pair in task.removed]
        assert task.removed == pairs(*removed)
        starts = [layer for layer in removed if layer - 1 not in removed]
        assert len(starts) == task.runs and min(removed) > 0 and max(removed) < shape.layers - 1


def test_it_runs_where_only_what_prunes_is_installed():
    code = (
        "import sys, benchmarks.llama_7b; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    absent = {"datasets", "locust", "uvicorn", "vllm", "export", "serving", "loadtest"}
    assert not absent & set(found.stdout.split())
