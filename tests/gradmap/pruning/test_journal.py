"""A run that was killed goes on where it was, and never with other inputs."""

import json
import signal
import subprocess
import sys
import time

import pytest

from gradmap.common.errors import EXIT_TERMINATED, UserError
from gradmap.data.calibration import build_calibration
from gradmap.methods.selection import Step
from gradmap.model.loading import load_tokenizer
from gradmap.pruning.journal import Journal
from gradmap.pruning.prune import journal_key
from gradmap.pruning.settings import PruneSettings
from tests.command_line import gradmap
from tests.gradmap.model.test_distributed import without_record
from tests.gradmap.pruning.test_prune import prune_arguments
from tests.gradmap.removals import pairs

STEPS = [
    Step(dict(zip(pairs(0, 1, "M1+A2", 2), (0.1, 1 / 3, 1e-30, 0.2), strict=True)), pairs("M1+A2")),
    Step(dict(zip(pairs(0, "A1+M2"), (0.5, 0.7), strict=True)), pairs(0)),
]


def kill_after_decisions(arguments, journal, decisions, number):
    """Runs gradmap and sends it a signal as soon as so many decisions are on disk."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gradmap", *arguments], stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        if journal.exists() and len(json.loads(journal.read_text())["steps"]) >= decisions:
            process.send_signal(number)
        time.sleep(0.002)
    return process.returncode


def test_a_killed_run_ends_in_the_identical_plan(picos, word_file, tmp_path):
    plans = {}
    for name, number, code in (
        ("whole", None, 0),
        ("killed", signal.SIGKILL, -signal.SIGKILL),
        ("terminated", signal.SIGTERM, EXIT_TERMINATED),
    ):
        out = tmp_path / name / "plan"
        arguments = [
            *map(str, prune_arguments(picos["llama"], word_file, out, remove=4)),
            "--samples",
            "48",
        ]
        if number is not None:
            journal = out.parent / ".plan.journal.json"
            assert kill_after_decisions(arguments, journal, 2, number) == code
            left = {path.name for path in out.parent.iterdir()}
            assert (
                left == {journal.name}
                if number == signal.SIGTERM
                else journal.name in left and "plan" not in left
            )
            arguments.append("--resume")
        finished = gradmap(*arguments)
        assert finished.returncode == 0, finished.stderr
        assert ("decisions of an interrupted run" in finished.stderr) == (number is not None)
        assert [path.name for path in out.parent.iterdir()] == ["plan"]  # nothing is left beside it
        plans[name] = (
            json.loads((out / "plan.json").read_text()),
            (out / "corrections.safetensors").read_bytes(),
        )
    for name in ("killed", "terminated"):
        assert without_record(plans[name][0]) == without_record(plans["whole"][0])
        assert plans[name][1] == plans["whole"][1]


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


DAMAGES = (
    "",
    "{",
    "[]",
    "7",
    '{"key": {}}',
    '{"key": {}, "steps": [7]}',
    '{"key": {}, "steps": [{"scores": {"a": 1}}]}',
)


@pytest.mark.parametrize("contents", DAMAGES)
def test_a_damaged_journal_is_not_gone_on_with(journal, contents, capsys):
    journal.path.write_text(contents)
    assert journal.open(None) == []
    assert f"Starting over: {journal.path} is damaged" in capsys.readouterr().err
    assert Journal.recorded(journal.path.with_name("plan"), {}, "--samples") is None
    with pytest.raises(UserError, match="nothing to resume: no whole"):
        journal.open(True)


def test_another_version_starts_over(picos, word_file, monkeypatch):
    """It may choose otherwise."""
    calibration = build_calibration(
        load_tokenizer(picos["llama"].directory), f"file:{word_file}", 4, 8, 0
    )
    settings = PruneSettings(
        remove=2, calibration=f"file:{word_file}", selector="gradient", compensator="none"
    )
    before = journal_key(picos["llama"].checkpoint, settings, calibration)
    monkeypatch.setattr("gradmap.pruning.prune.version", lambda package: "another")
    assert journal_key(picos["llama"].checkpoint, settings, calibration) != before


def changed(settings, **changes):
    return settings.model_copy(update=changes)


def test_the_key_holds_what_decisions_depend_on_and_nothing_else(picos, word_file):
    def key(family, settings):
        tokenizer = load_tokenizer(picos[family].checkpoint.directory)
        calibration = build_calibration(tokenizer, settings.calibration, 4, 8, settings.seed)
        return journal_key(picos[family].checkpoint, settings, calibration)

    settings = PruneSettings(
        remove=2, calibration=f"file:{word_file}", selector="gradient", compensator="projection"
    )
    plain = key("llama", settings)
    assert (
        key("llama", changed(settings, remove=3, compensator="none", device="cpu", stream=True))
        == plain
    )
    others = ({"seed": 1}, {"dtype": "float64"}, {"one_shot": True}, {"budget_minutes": 1.0})
    assert plain not in [
        key("mistral", settings),
        *(key("llama", changed(settings, **changes)) for changes in others),
    ]


def test_a_run_with_a_budget_goes_on_with_the_samples_that_it_once_got(tmp_path):
    """The machine may be faster now."""
    out = tmp_path / "plan"
    journal = Journal.beside(out, {"--budget-minutes": 5.0, "--samples": 48})
    assert Journal.recorded(out, {"--budget-minutes": 5.0}, "--samples") is None
    journal.write([])
    assert Journal.recorded(out, {"--budget-minutes": 5.0}, "--samples") == 48
    assert Journal.recorded(out, {"--budget-minutes": 6.0}, "--samples") is None
