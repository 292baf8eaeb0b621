"""A stage runs again exactly when its inputs, or what it left, are no longer what they were."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from gradmap.common import stages
from gradmap.common.errors import StageError, UserError
from gradmap.common.files import atomic_directory, write_text
from gradmap.common.stages import STAGES_DIRECTORY, Stage, is_done, run_stage, stage_record


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Its command writes a directory, as `prune` does, and a file; `ran` is how often."""
    (tmp_path / "input").write_text("a")
    out = tmp_path / "out"
    stage = Stage(
        "made", ("make",), (tmp_path / "input",), (out / "plan", out / "eval.json"), schema=1
    )

    def run(command):
        with atomic_directory(out / "plan", marker="plan.json") as partial:
            (partial / "plan.json").write_text("{}")
            (partial / "weights").write_bytes(b"\0" * 10)
        write_text(out / "eval.json", "{}")
        ran.append(command)
        return 0, SimpleNamespace(ru_maxrss=1)

    ran: list = []
    monkeypatch.setattr(stages, "run_process", run)
    run_stage(stage, "[1/1]", out, forced=False)
    assert len(ran) == 1
    return stage, out, ran


def test_its_marker_says_what_it_left(stage):
    made, out, _ = stage
    outputs = stage_record(out, made.name)["outputs"]
    assert sorted(outputs) == ["eval.json", "plan/plan.json", "plan/weights"]
    status = (out / "plan" / "weights").stat()
    assert outputs["plan/weights"] == {
        "size": 10,
        "mtime_ns": status.st_mtime_ns,
        "sha256": "01d448afd928065458cf670b60f5a594d735af0172c8d67f22a81680132681ca",
    }


CHANGES = {
    "a byte": lambda out: (out / "plan" / "weights").write_bytes(b"\0" * 9 + b"\1"),
    "a size": lambda out: (out / "plan" / "weights").write_bytes(b""),
    "a file is gone": lambda out: (out / "plan" / "weights").unlink(),
    "the file that marks a result is gone": lambda out: (out / "plan" / "plan.json").unlink(),
    "a directory is gone": lambda out: shutil.rmtree(out / "plan"),
    "a file became a directory": lambda out: [
        (out / "eval.json").unlink(),
        (out / "eval.json").mkdir(),
    ],
    "the marker": lambda out: (out / STAGES_DIRECTORY / "made.json").unlink(),
    "the input": lambda out: out.with_name("input").write_text("b"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_is_done_again_when_something_changed(stage, change, capsys):
    made, out, ran = stage
    change(out)
    assert not is_done(made, out)
    if (out / "eval.json").is_dir():
        (out / "eval.json").rmdir()
    capsys.readouterr()
    run_stage(made, "[1/1]", out, forced=False)
    assert len(ran) == 2 and is_done(made, out)
    assert (out / "plan" / "weights").read_bytes() == b"\0" * 10


def test_why_it_is_done_again_is_said(stage, capsys):
    made, out, _ = stage
    CHANGES["a byte"](out)
    run_stage(made, "[1/1]", out, forced=False)
    assert f"[1/1] made: {out / 'plan' / 'weights'} was changed" in capsys.readouterr().err


def test_it_is_not_done_again_for_what_it_did_not_write(stage, capsys):
    made, out, ran = stage
    (out / "plan" / "notes.txt").write_text("mine")
    run_stage(made, "[1/1]", out, forced=False)
    assert len(ran) == 1
    assert "done before, inputs unchanged" in capsys.readouterr().err


def test_remains_with_files_of_others_are_left_alone(stage):
    made, out, _ = stage
    (out / "plan" / "plan.json").unlink()
    (out / "plan" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no plan\.json, so it will not be overwritten"):
        run_stage(made, "[1/1]", out, forced=False)
    assert (out / "plan" / "notes.txt").read_text() == "mine"


def test_a_marker_that_is_half_of_one_is_none(stage):
    made, out, _ = stage
    record = stage_record(out, made.name)
    for key in record:
        partial = {name: value for name, value in record.items() if name != key}
        (out / STAGES_DIRECTORY / "made.json").write_text(json.dumps(partial))
        assert not is_done(made, out)


@pytest.mark.parametrize("code", [1, 3, 4])
def test_a_verdict_is_one_only_with_a_result_of_its_own(stage, monkeypatch, code):
    """Python exits with 1 where it cannot even start us, and an earlier result may lie there."""
    made, out, _ = stage
    gated = replace(made, verdicts=True)

    def judge(command):
        write_text(out / "eval.json", "{}")
        return code, SimpleNamespace(ru_maxrss=1)

    monkeypatch.setattr(stages, "run_process", lambda command: (code, SimpleNamespace(ru_maxrss=1)))
    with pytest.raises(StageError, match=f"failed with exit code {code}"):
        run_stage(gated, "[1/1]", out, forced=True)
    assert not is_done(gated, out)
    monkeypatch.setattr(stages, "run_process", judge)
    run_stage(gated, "[1/1]", out, forced=True)
    assert is_done(gated, out)
