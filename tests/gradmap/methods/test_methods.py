"""Methods say of themselves what they are and need, wherever they are installed."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from gradmap.common.errors import UserError
from gradmap.methods import registry
from gradmap.methods.registry import (
    compensator,
    compensator_names,
    selector,
    selector_names,
)
from scripts.write_method_tables import fill
from tests.command_line import gradmap
from tests.conftest import ROOT
from tests.families import LAYERS
from tests.gradmap.pruning.test_prune import prune_arguments

THEIRS = """
from gradmap.methods.base import Compensator, Selector
from gradmap.methods.compensation import Compensation
from gradmap.methods.selection import FixedScores


def score(subject):
    return FixedScores(subject, {one: abs(one.layer - 2.2) for one in subject.left(())})


def refuse(job, options):
    from gradmap.common.errors import UserError

    if job.remove > 2:
        raise UserError("acme removes two layers at most; lower --remove.")


MIDDLE = Selector(
    name="acme-middle", about="the middle", make=score, check=refuse, score_label="distance"
)
NOTHING = Compensator(name="acme-nothing", about="nothing", run=lambda pruned: Compensation())
"""
ENTRY_POINTS = """[gradmap.selectors]
acme-middle = acme_methods:MIDDLE

[gradmap.compensators]
acme-nothing = acme_methods:NOTHING
"""

OF_PAIRS = ("--unit", "pair")
FLATTENED = ("--compensator", "flatten", "--held-out", "2")
ALIKE = "is about layers that are alike, so that whole ones must go"
MERGES = "merges layers, so that whole layers must go"
PATCHES = "patches the hidden state between layers, so that whole ones must go"
WHOLE = "give --unit layer, or another one."


@pytest.fixture
def their_package(tmp_path):
    """The directory that a package with methods is installed in."""
    site = tmp_path / "site"
    info = site / "acme_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_methods.py").write_text(THEIRS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return site


def run_with(site, *arguments):
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "gradmap", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_methods_of_another_package_are_chosen_by_name(their_package, picos, word_file, tmp_path):
    arguments = prune_arguments(picos["llama"], word_file, tmp_path / "plan")
    chosen = ("--selector", "acme-middle", "--compensator", "acme-nothing")
    finished = run_with(their_package, *arguments, *chosen)
    assert finished.returncode == 0, finished.stderr
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["removal_order"] == [2, 3]
    assert plan["recipe"]["compensator"] == "acme-nothing"
    refused = run_with(their_package, *arguments, *chosen, "--remove", 3)
    assert refused.returncode == 2
    assert refused.stderr.endswith("Error: acme removes two layers at most; lower --remove.\n")
    assert "acme-middle" in run_with(their_package, "prune", "--help").stdout


def test_two_packages_with_one_name_are_refused(monkeypatch):
    group = registry.SELECTORS
    entries = [EntryPoint("sleb", value, group) for value in ("ours:SLEB", "theirs:SLEB")]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    registry._entries.cache_clear()
    try:
        with pytest.raises(UserError, match=r"called sleb \(ours:SLEB and theirs:SLEB"):
            selector_names()
    finally:
        registry._entries.cache_clear()


@pytest.mark.parametrize("name", selector_names())
def test_a_selector_says_what_it_is(name):
    method = selector(name)
    assert method.name == name
    assert method.about and method.score_label and method.round_takes


@pytest.mark.parametrize("name", compensator_names())
def test_a_compensator_says_what_it_is(name):
    method = compensator(name)
    assert method.name == name
    assert method.about


def test_the_tables_of_the_documentation_are_what_methods_say():
    page = (ROOT / "docs" / "methods.md").read_text()
    assert page == fill(page), "run `python -m scripts.write_method_tables docs/methods.md`"


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", ("--selector", "repair", "--stream"), "--selector repair needs all weights in"),
        ("llama", ("--selector", "taylor", "--stream"), "--selector taylor needs all weights in"),
        ("llama", ("--selector", "magnitude", "--stream"), "magnitude needs all weights in memory"),
        ("llama", ("--selector", "gradpruner", "--stream"), "gradpruner needs all weights in"),
        ("llama", ("--selector", "laco", "--stream"), "--selector laco needs all weights in"),
        ("llama", ("--compensator", "mka", "--stream"), "--compensator mka needs all weights in"),
        ("gemma2", ("--compensator", "projection"), "cannot be corrected by --compensator"),
        ("mixtral", ("--compensator", "mka"), "do not correspond, so these cannot be merged"),
        ("mixtral", ("--compensator", "gradpruner"), "so these cannot be merged; use sequential"),
        ("mixtral", FLATTENED, "their channels cannot move"),
        ("gpt2", FLATTENED, "its FFN has biases"),
        ("gemma2", FLATTENED, "cannot be corrected by --compensator"),
        ("mixtral", ("--compensator", "laco"), "so these cannot be merged; use sequential"),
        ("mixtral", ("--selector", "laco"), "so these cannot be merged; use --selector repair"),
        ("mixtral", ("--compensator", "refit", "--held-out", "2"), "which cannot be refitted"),
        ("gemma2", ("--compensator", "replace-me"), "cannot be corrected by --compensator"),
        ("gemma2", ("--compensator", "replace-me-cosine"), "cannot be corrected by --compensator"),
        ("mixtral", ("--side", "right"), "use --side left"),
        ("llama", ("--target", "q"), "has no closed form; use --compensator projection-adam"),
        ("llama", ("--top-z", LAYERS), f"--top-z is {LAYERS}, but only {LAYERS - 2} layers"),
        ("llama", ("--selector", "mka", "--samples", 2), "by 3 samples at least"),
        ("llama", ("--selector", "window", "--protect-first", 2, "--protect-last", 2), "protect"),
        ("llama", ("--selector", "manual", "--layers", "1,1"), "must name distinct layers"),
        ("llama", ("--selector", "manual", "--layers", "M2+A3,1"), "no layer; give --unit pair."),
        ("llama", (*OF_PAIRS, "--selector", "manual", "--layers", "M2+A4,1"), "or neighbours in"),
        ("llama", (*OF_PAIRS, "--selector", "mka"), f"mka {ALIKE}; {WHOLE}"),
        ("llama", (*OF_PAIRS, "--selector", "mka-as-released"), f"released {ALIKE}; {WHOLE}"),
        ("llama", (*OF_PAIRS, "--compensator", "mka"), f"mka {MERGES}; {WHOLE}"),
        ("llama", (*OF_PAIRS, "--compensator", "gradpruner"), f"gradpruner {MERGES}; {WHOLE}"),
        ("llama", (*OF_PAIRS, "--compensator", "linear-patch"), f"linear-patch {PATCHES}; {WHOLE}"),
        ("llama", (*OF_PAIRS, "--compensator", "ghosted"), f"ghosted {PATCHES}; {WHOLE}"),
        ("llama", (*OF_PAIRS, *FLATTENED), f"flatten {MERGES}; {WHOLE}"),
        ("mixtral", ("--compensator", "streamline"), "experts of a layer are not trained"),
        (
            "llama",
            (*OF_PAIRS, "--compensator", "streamline"),
            f"streamline trains a layer in place of several, so that whole layers must go; {WHOLE}",
        ),
        ("llama", (*OF_PAIRS, "--compensator", "laco"), f"laco {MERGES}; {WHOLE}"),
        ("llama", (*OF_PAIRS, "--selector", "laco"), f"laco {MERGES}; {WHOLE}"),
    ],
)
def test_what_a_method_cannot_do_is_said_before_the_model_is_loaded(
    picos, word_file, tmp_path, monkeypatch, family, changes, message
):
    monkeypatch.delattr("gradmap.pruning.prune.load_model")
    arguments = prune_arguments(picos[family], word_file, tmp_path / "plan")
    finished = gradmap(*arguments, *changes)
    assert finished.returncode == 2, finished.stderr
    assert message in finished.stderr
    assert not (tmp_path / "plan").exists()
