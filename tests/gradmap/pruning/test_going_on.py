"""A plan that goes on from another one, with its corrections, to remove more."""

import json

import pytest
import torch

from export.artifact import open_source
from gradmap.common.errors import UserError
from gradmap.evaluation.contamination import CalibratedOn
from gradmap.healing.heal import heal
from gradmap.model.corrections import LowRank, Update
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_tokenizer
from gradmap.model.sublayers import Pair, originals
from gradmap.pruning.from_plan import prune_from_plan
from gradmap.pruning.plan import PLAN_FILE, load_calibration_ids, load_changes, load_plan
from gradmap.pruning.prune import prune
from gradmap.pruning.settings import PruneSettings
from tests.command_line import gradmap
from tests.conftest import Pico
from tests.export.sources import export
from tests.families import LAYERS
from tests.gradmap.healing.small_healings import (
    KilledError,
    asking,
    divergence_of,
    write_sentences,
)

# Norms behind maps, transposed weights, experts, q/k norms of a joined layer.
FAMILIES = [("llama", "layer"), ("gemma2", "pair"), ("gpt2", "pair"), ("mixtral", "layer")]


def settings(word_file, remove, **changes):
    given = {
        "selector": "repair",
        "compensator": "refit",
        "samples": 12,
        "tokens": 16,
        "dtype": "float64",
        "device": "cpu",
        "accept": "always",
    }
    return PruneSettings(remove=remove, calibration=f"file:{word_file}", **(given | changes))


def logits_of(pico, directory, input_ids):
    plan, model = load_plan(directory), pico.load()
    with LayeredModel.of(model).changed(load_changes(directory, plan), without=plan.removal_order):
        return model(input_ids=input_ids, use_cache=False).logits


def in_original(plan, removed):
    """What is removed from what a plan makes, as the base model calls it."""
    names = originals(LAYERS, plan.removal_order)
    return [Pair(names[pair.first], names[pair.second]) for pair in removed]


@pytest.mark.parametrize(("family", "unit"), FAMILIES)
def test_it_is_what_pruning_the_artifact_gives(picos, word_file, tmp_path, input_ids, family, unit):
    pico = picos[family]
    compensator = "projection" if family == "mixtral" else "distil"
    # what goes first is in front of what is left, so that layers are called otherwise
    asked = {"unit": unit, "compensator": compensator, "protect_last": 2}
    prune(pico.checkpoint, settings(word_file, 1, **asked), tmp_path / "one")
    more = settings(word_file, 2, **asked)
    plan = prune_from_plan(pico.checkpoint, tmp_path / "one", more, tmp_path / "both")
    source = open_source(pico.checkpoint, tmp_path / "one")
    export(source, tmp_path, "hf", dtype="float32")
    artifact = Pico(family, tmp_path / "hf")
    prune(artifact.checkpoint, settings(word_file, 1, **asked), tmp_path / "two")
    later = load_plan(tmp_path / "two")
    assert plan.removal_order[1:] == in_original(source.plan, later.removal_order)
    assert [len(step.scores) for step in plan.steps] == [
        *(len(step.scores) for step in source.plan.steps),
        *(len(step.scores) for step in later.steps),
    ]
    made = zip(later.corrections, plan.corrections[-len(later.corrections) :], strict=True)
    assert any(before.layer != correction.layer for before, correction in made)
    expected = logits_of(artifact, tmp_path / "two", input_ids)
    found = logits_of(pico, tmp_path / "both", input_ids)
    # the artifact and what is stored of corrections are rounded to float32
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    assert torch.equal(
        load_calibration_ids(tmp_path / "both", plan),
        load_calibration_ids(tmp_path / "one", source.plan),
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("texts") / "healing.jsonl", 200)


@pytest.fixture(scope="module")
def healed(picos, word_file, texts, tmp_path_factory):
    """Without one layer, refitted and healed."""
    directory = tmp_path_factory.mktemp("healed")
    prune(picos["llama"].checkpoint, settings(word_file, 1), directory / "plan")
    heal(picos["llama"].checkpoint, directory / "plan", asking(texts), directory / "healed")
    return directory / "healed"


def test_a_healed_plan_is_gone_on_from_and_healed_again(
    picos, word_file, texts, healed, tmp_path, capsys
):
    pico, before = picos["llama"], load_plan(healed)
    more = settings(word_file, 2, compensator="distil")
    prune_from_plan(pico.checkpoint, healed, more, tmp_path / "two")
    pruned = load_plan(tmp_path / "two")
    assert pruned.removal_order[:1] == before.removal_order
    kinds = [[type(change) for change in each] for each in _of_weights(tmp_path / "two")]
    assert [Update, LowRank, Update, LowRank] in kinds
    options = asking(texts)
    heal(pico.checkpoint, tmp_path / "two", options, tmp_path / "again")
    again = load_plan(tmp_path / "again")
    assert [record.removed for record in again.healing] == [1, 2]
    assert again.timings_s["heal"] > before.timings_s["heal"]
    # what was trained first goes on, and what came behind it stays
    known, found = (_of_weights(tmp_path / name) for name in ("two", "again"))
    for old, new in zip(known, found, strict=True):
        trained = [change for change in new if isinstance(change, LowRank)]
        fixed = [change for change in old if isinstance(change, LowRank)]
        assert len(trained) == len(fixed) == 2
        assert not torch.equal(trained[0].up, fixed[0].up)
        assert torch.equal(trained[1].up, fixed[1].up)
    curve = again.healing[1].curve
    ids = options.mixture.open(_tokenizer(pico)).held_out
    assert curve[0].held_out_divergence == pytest.approx(
        divergence_of(pico, tmp_path / "two", ids), rel=1e-5
    )
    assert again.healing[1].lowest_divergence == pytest.approx(
        divergence_of(pico, tmp_path / "again", ids), rel=1e-5
    )
    assert again.healing[1].lowest_divergence < curve[0].held_out_divergence
    # of the same texts, what comes next
    assert again.healing[1].drawn_before == before.healing[0].samples == 96
    assert again.healing[1].samples == 96
    both = options.mixture.open(_tokenizer(pico))
    both.draw(192)
    assert again.healing[1].sha256 == both.sha256
    capsys.readouterr()
    seen = CalibratedOn.of_plan(tmp_path / "again", _tokenizer(pico)).seen
    assert "cannot be drawn" not in capsys.readouterr().err
    held_out = len(both.held_out)
    assert [len(each.samples) for each in seen] == [12, 96 + held_out, 192 + held_out]


def _of_weights(directory):
    changes = load_changes(directory, load_plan(directory))
    return [changes[place] for place in sorted(changes)]


def _tokenizer(pico):
    return load_tokenizer(pico.directory)


@pytest.fixture
def killed(picos, word_file, healed, tmp_path):
    """A run in `stopped` that chose all layers."""

    def kill(*args):
        raise KilledError

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("gradmap.pruning.prune._repair", kill)
        with pytest.raises(KilledError):
            prune_from_plan(
                picos["llama"].checkpoint, healed, settings(word_file, 4), tmp_path / "stopped"
            )


def test_a_run_that_was_killed_goes_on(picos, word_file, healed, tmp_path, killed, capsys):
    checkpoint, more = picos["llama"].checkpoint, settings(word_file, 4)
    prune_from_plan(checkpoint, healed, more, tmp_path / "whole")
    assert "Going on" not in capsys.readouterr().err
    prune_from_plan(checkpoint, healed, more, tmp_path / "stopped")
    assert "Going on after 3 decisions" in capsys.readouterr().err
    whole, resumed = (load_plan(tmp_path / name) for name in ("whole", "stopped"))
    assert resumed.steps == whole.steps
    assert resumed.corrections == whole.corrections
    assert not (tmp_path / ".stopped.journal.json").exists()


def test_a_run_from_another_plan_begins_anew(picos, word_file, healed, tmp_path, killed, capsys):
    """Of the same layers, but not healed."""
    unhealed = healed.with_name("plan")
    capsys.readouterr()
    prune_from_plan(
        picos["llama"].checkpoint, unhealed, settings(word_file, 4), tmp_path / "stopped"
    )
    told = capsys.readouterr().err
    assert f"Starting over: the plan ({unhealed}) changed" in told and "Going on" not in told


def test_the_command_goes_on_with_the_methods_of_the_plan(picos, word_file, healed, tmp_path):
    arguments = ("--model", picos["llama"].directory, "--from-plan", healed, "--remove", 2)
    finished = gradmap("prune", *arguments, "--out", tmp_path / "two", "--json")
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout.splitlines()[-1])
    assert len(told["removal_order"]) == 2
    recipe = load_plan(tmp_path / "two").recipe
    assert (recipe["selector"], recipe["compensator"], recipe["remove"]) == ("repair", "refit", 2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"selector": "manual", "layers": ["1"]}, "were named .*; name all of them"),
        ({"compensator": "linear-patch"}, "patches the hidden state, .*another --compensator"),
        ({"selector": "gradient", "stream": True}, "with --stream, .*; export it, and prune"),
    ],
)
def test_a_plan_that_cannot_be_gone_on_from_is_refused(picos, word_file, tmp_path, asked, message):
    checkpoint = picos["llama"].checkpoint
    prune(checkpoint, settings(word_file, 1, **asked), tmp_path / "one")
    before = (tmp_path / "one" / PLAN_FILE).read_bytes()
    with pytest.raises(UserError, match=message):
        prune_from_plan(checkpoint, tmp_path / "one", settings(word_file, 2), tmp_path / "two")
    assert not (tmp_path / "two").exists()
    assert (tmp_path / "one" / PLAN_FILE).read_bytes() == before
