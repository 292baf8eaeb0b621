"""A run that was killed goes on where it was, and never with other inputs."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from gradmap.calibration import build_calibration
from gradmap.checkpoint import load_tokenizer
from gradmap.errors import UserError
from gradmap.journal import Journal
from gradmap.prune import journal_key
from gradmap.prune_settings import PruneSettings
from gradmap.selection import Step
from tests.command_line import gradmap
from tests.gradmap.test_distributed import without_record
from tests.gradmap.test_prune import prune_arguments

STEPS = [Step({0: 0.1, 1: 1 / 3, 2: 1e-30}, (2,)), Step({0: 0.5, 1: 0.7}, (0,))]


def kill_after_decisions(arguments, journal, decisions):
    """Runs gradmap and kills it with SIGKILL as soon as so many decisions are on disk."""
    process = subprocess.Popen([sys.executable, "-m", "gradmap", *arguments], stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if journal.exists() and len(json.loads(journal.read_text())["steps"]) >= decisions:
            process.kill()
        time.sleep(0.002)
    return process.returncode


def test_a_killed_run_ends_in_the_identical_plan(picos, word_file, tmp_path):
    plans = {}
    for name in ("whole", "killed"):
        out = tmp_path / name / "plan"
        arguments = [*map(str, prune_arguments(picos["llama"], word_file, out, remove=4)), "--samples", "48"]
        if name == "killed":
            assert kill_after_decisions(arguments, out.parent / ".plan.journal.json", 2) == -signal.SIGKILL
            assert not out.exists()
            arguments.append("--resume")
        finished = gradmap(*arguments)
        assert finished.returncode == 0, finished.stderr
        assert ("decisions of an interrupted run" in finished.stderr) == (name == "killed")
        assert [path.name for path in out.parent.iterdir()] == ["plan"]  # nothing is left beside it
        plans[name] = json.loads((out / "plan.json").read_text()), (out / "corrections.safetensors").read_bytes()
    assert without_record(plans["killed"][0]) == without_record(plans["whole"][0])
    assert plans["killed"][1] == plans["whole"][1]


@pytest.fixture
def journal(tmp_path):
    journal = Journal.beside(tmp_path / "plan", {"the model": "a", "--dtype": "auto"})
    journal.write(STEPS)
    return journal


@pytest.mark.parametrize("resume", [True, None])
def test_decisions_come_back_bit_by_bit(journal, resume):
    assert journal.open(resume) == STEPS


def test_fresh_ignores_them(journal):
    assert journal.open(False) == []


def test_other_inputs_are_refused_or_start_over(journal, capsys):
    other = Journal(journal.path, {"the model": "b", "--dtype": "auto"})
    with pytest.raises(UserError, match=r"the model changed since .* start over with --fresh"):
        other.open(True)
    assert other.open(None) == []
    assert "Starting over: the model changed" in capsys.readouterr().err


def test_resuming_nothing_is_refused(tmp_path):
    journal = Journal.beside(tmp_path / "plan", {})
    assert journal.open(None) == []
    with pytest.raises(UserError, match="nothing to resume"):
        journal.open(True)


def test_the_key_holds_what_decisions_depend_on_and_nothing_else(picos, word_file):
    def key(family, settings):
        tokenizer = load_tokenizer(picos[family].checkpoint.directory)
        calibration = build_calibration(tokenizer, settings.calibration, 4, 8, settings.seed)
        return journal_key(picos[family].checkpoint, settings, calibration)

    settings = PruneSettings(2, f"file:{word_file}", selector="gradient", compensator="projection")
    plain = key("llama", settings)
    assert key("llama", replace(settings, remove=3, compensator="none", device="cpu", stream=True)) == plain
    others = ({"seed": 1}, {"dtype": "float64"}, {"one_shot": True}, {"budget_minutes": 1.0})
    assert plain not in [key("mistral", settings), *(key("llama", replace(settings, **changes)) for changes in others)]


def test_a_run_with_a_budget_goes_on_with_the_samples_that_it_once_got(tmp_path):
    """The machine may be faster now."""
    out = tmp_path / "plan"
    journal = Journal.beside(out, {"--budget-minutes": 5.0, "--samples": 48})
    assert Journal.recorded(out, {"--budget-minutes": 5.0}, "--samples") is None
    journal.write([])
    assert Journal.recorded(out, {"--budget-minutes": 5.0}, "--samples") == 48
    assert Journal.recorded(out, {"--budget-minutes": 6.0}, "--samples") is None
