"""Plans that remove pairs of sublayers: recomputed, nested, and gone on with after a crash."""

import json

import pytest

from gradmap.common.errors import UserError
from gradmap.model.sublayers import candidates, sublayers_left
from gradmap.pruning.from_plan import prune_from_plan
from gradmap.pruning.plan import load_calibration_ids, load_plan
from gradmap.pruning.presets import choose_methods
from gradmap.pruning.prune import prune
from gradmap.pruning.settings import PruneSettings
from tests.command_line import gradmap
from tests.families import LAYERS
from tests.gradmap.methods.test_pair_scores import turns
from tests.gradmap.model.test_distributed import without_record
from tests.gradmap.pruning.test_prune import prune_arguments
from tests.gradmap.removals import pairs
from tests.gradmap.repairs import states_between

FAMILY = "qwen3"  # of which layers go, and other pairs


def settings(word_file, remove=3, **changes):
    given = {
        "selector": "block-influence",
        "compensator": "refit",
        "unit": "pair",
        "samples": 12,
        "tokens": 16,
        "dtype": "float64",
        "device": "cpu",
    }
    source = f"file:{word_file}"
    return PruneSettings(remove=remove, calibration=source, **(given | changes))


def recorded(out):
    return without_record(json.loads((out / "plan.json").read_text()))


@pytest.fixture(scope="module")
def planned(picos, word_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "plan"
    prune(picos[FAMILY].checkpoint, settings(word_file), out)
    return out


def test_a_plan_of_pairs_can_be_recomputed_from_its_own_files(planned, picos):
    plan, model = load_plan(planned), picos[FAMILY].layered()
    input_ids = load_calibration_ids(planned, plan)
    assert {pair.is_layer for pair in plan.removal_order} == {False, True}
    for number, step in enumerate(plan.steps):
        removed = plan.removal_order[:number]
        assert list(step.scores) == candidates(sublayers_left(LAYERS, removed), "pair")
        expected = turns(states_between(model, input_ids, removed), 2)
        assert list(step.scores.values()) == pytest.approx(expected, rel=1e-9)
        assert step.removed == [list(step.scores)[expected.index(min(expected))]]


def test_a_larger_plan_of_pairs_holds_every_smaller_one(planned, picos, word_file, tmp_path):
    checkpoint = picos[FAMILY].checkpoint
    prune(checkpoint, settings(word_file, 2), tmp_path / "direct")
    prune_from_plan(checkpoint, planned, settings(word_file, 2), tmp_path / "nested")
    assert recorded(tmp_path / "nested") == recorded(tmp_path / "direct")
    assert recorded(tmp_path / "nested")["removal_order"] == recorded(planned)["removal_order"][:2]
    assert load_plan(tmp_path / "nested").recipe["unit"] == "pair"


def test_a_compensator_that_needs_whole_layers_does_not_repair_a_plan_of_pairs(
    planned, picos, word_file, tmp_path
):
    wanted = settings(word_file, 2, compensator="gradpruner", unit="layer")
    with pytest.raises(UserError, match="merges layers, so that whole layers must go"):
        prune_from_plan(picos[FAMILY].checkpoint, planned, wanted, tmp_path / "plan")


def go_on_after_two(checkpoint, asked, tmp_path, monkeypatch):
    """A whole run in `whole`, and one in `stopped` that goes on with its first two decisions."""
    monkeypatch.setattr("gradmap.pruning.journal.Journal.remove", lambda journal: None)
    prune(checkpoint, asked, tmp_path / "whole")
    stored = json.loads((tmp_path / ".whole.journal.json").read_text())
    assert len(stored["steps"]) == 3
    stored["steps"] = stored["steps"][:2]
    (tmp_path / ".stopped.journal.json").write_text(json.dumps(stored))
    prune(checkpoint, asked, tmp_path / "stopped", resume=True)


def test_a_run_in_an_order_of_pairs_goes_on(picos, word_file, tmp_path, monkeypatch, capsys):
    asked = settings(word_file, selector="manual", layers=["M1+A2", "A1+M2", 4])
    go_on_after_two(picos[FAMILY].checkpoint, asked, tmp_path, monkeypatch)
    assert "Going on after 2 decisions" in capsys.readouterr().err
    assert recorded(tmp_path / "stopped") == recorded(tmp_path / "whole")


@pytest.mark.parametrize("selector", ["block-influence", "repair"])
def test_a_run_that_was_stopped_goes_on_with_its_pairs(
    picos, word_file, tmp_path, monkeypatch, capsys, selector
):
    checkpoint, asked = picos[FAMILY].checkpoint, settings(word_file, selector=selector)
    go_on_after_two(checkpoint, asked, tmp_path, monkeypatch)
    assert "Going on after 2 decisions" in capsys.readouterr().err
    assert recorded(tmp_path / "stopped") == recorded(tmp_path / "whole")
    with pytest.raises(UserError, match="--unit changed since"):
        layers = asked.model_copy(update={"unit": "layer"})
        prune(checkpoint, layers, tmp_path / "stopped", resume=True)


def test_the_command_line_takes_and_tells_pairs(picos, word_file, tmp_path):
    out = tmp_path / "plan"
    chosen = ("--selector", "manual", "--unit", "pair", "--layers", "M1+A2,A1+M2,4")
    arguments = (*prune_arguments(picos[FAMILY], word_file, out, remove=3), *chosen, "--json")
    finished = gradmap(*arguments)
    assert finished.returncode == 0, finished.stderr
    order = pairs("M1+A2", "A1+M2", 4)
    written = ["M1+A2", "A1+M2", 4]
    assert json.loads(finished.stdout.splitlines()[-1])["removal_order"] == written
    assert "M1+A2, A1+M2, 4" in finished.stdout
    assert recorded(out)["removal_order"] == written
    assert tuple(load_plan(out).removal_order) == order


def test_the_methods_of_a_plan_of_pairs_go_on_with_pairs(planned):
    assert choose_methods(None, planned, compensator="sequential").unit == "pair"
    assert choose_methods("best", planned).unit == "layer"
