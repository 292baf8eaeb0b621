"""A run that was killed goes on and ends the same; what it kept and is no good is refused."""

import json
import math

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.data import documents
from gradmap.healing import kept_training
from gradmap.methods import distillation
from gradmap.pruning.plan import load_changes, load_plan
from tests.gradmap.healing.small_healings import (
    STEP,
    TOKENS,
    KilledError,
    asking,
    heal_pico,
    write_sentences,
)


def test_a_run_that_was_killed_goes_on_and_ends_as_if_nothing_had_been(
    picos, plans, texts, tmp_path, capsys, request
):
    options = asking(texts, budget_tokens=30 * STEP)
    whole = heal_pico(picos, plans["none"], options, tmp_path / "whole")
    request.getfixturevalue("killed_after_two_rounds")
    with pytest.raises(KilledError):
        heal_pico(picos, plans["none"], options, tmp_path / "healed")
    capsys.readouterr()
    resumed = heal_pico(picos, plans["none"], options, tmp_path / "healed")
    assert "Going on after 16 steps" in capsys.readouterr().err
    assert not (tmp_path / ".healed.healing").exists()
    timeless = [
        [point.model_copy(update={"seconds": 0.0}) for point in plan.healing[0].curve]
        for plan in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    assert whole.healing[0].sha256 == resumed.healing[0].sha256
    changes, expected = (
        load_changes(tmp_path / name, load_plan(tmp_path / name)) for name in ("healed", "whole")
    )
    for place, (factors,) in expected.items():
        for name, tensor in factors.tensors.items():
            assert torch.equal(changes[place][0].tensors[name], tensor)


@pytest.mark.parametrize(
    ("resume", "said"), [(None, "Starting over: --rank changed"), (False, None), (True, "Cannot")]
)
def test_another_run_does_not_go_on_with_what_was_kept(
    picos, plans, texts, tmp_path, capsys, killed_after_two_rounds, resume, said
):
    out = tmp_path / "healed"
    with pytest.raises(KilledError):
        heal_pico(picos, plans["none"], asking(texts), out)
    capsys.readouterr()
    other = asking(texts, rank=5, budget_tokens=2 * STEP)
    if resume:
        with pytest.raises(UserError, match="Cannot resume: --budget-tokens, --rank changed"):
            heal_pico(picos, plans["none"], other, out, resume)
        return
    healed = heal_pico(picos, plans["none"], other, out, resume)
    assert healed.healing[0].samples == 2 * STEP // TOKENS
    told = capsys.readouterr().err
    assert "Going on" not in told
    assert ("Starting over" in told) == (resume is None)


@pytest.mark.parametrize("name", [kept_training.TENSORS_FILE, kept_training.PROGRESS_FILE])
def test_what_was_kept_and_is_damaged_is_refused(
    picos, plans, texts, tmp_path, killed_after_two_rounds, name
):
    with pytest.raises(KilledError):
        heal_pico(picos, plans["none"], asking(texts), tmp_path / "healed")
    damaged = tmp_path / ".healed.healing" / name
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged; start over with --fresh"):
        heal_pico(picos, plans["none"], asking(texts), tmp_path / "healed")


def test_a_text_that_changed_behind_what_is_held_of_it_is_noticed(
    picos, plans, tmp_path, monkeypatch, killed_after_two_rounds
):
    monkeypatch.setattr(documents, "BUFFER_DOCUMENTS", 20)
    text = write_sentences(tmp_path / "text.jsonl", 400)
    with pytest.raises(KilledError):
        heal_pico(picos, plans["none"], asking(text), tmp_path / "healed")
    lines = text.read_text().splitlines()
    turned = [line.replace("w1", "w2") for line in lines[21:]]
    text.write_text("\n".join(lines[:21] + turned))
    with pytest.raises(UserError, match=r"A text is not what it was.*--fresh"):
        heal_pico(picos, plans["none"], asking(text), tmp_path / "healed")
    heal_pico(picos, plans["none"], asking(text), tmp_path / "healed", resume=False)


def test_there_may_be_nothing_to_resume(picos, plans, texts, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        heal_pico(picos, plans["none"], asking(texts), tmp_path / "healed", resume=True)


def test_a_loss_that_is_no_number_stops_training_and_names_the_step(
    picos, plans, texts, tmp_path, monkeypatch
):
    set_gradients, calls = distillation.set_lesson_gradients, []

    def diverge(*given):
        calls.append(given)
        divergence = set_gradients(*given)
        return divergence if len(calls) < 12 else divergence * math.nan

    monkeypatch.setattr("gradmap.healing.trainer.set_lesson_gradients", diverge)
    monkeypatch.setattr(kept_training, "KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(kept_training, "WRITING_SHARE", math.inf)
    with pytest.raises(UserError, match=r"loss of step 11 is nan.*lower --learning-rate"):
        heal_pico(picos, plans["none"], asking(texts), tmp_path / "healed")
    assert not (tmp_path / "healed").exists()
    kept = json.loads((tmp_path / ".healed.healing" / "progress.json").read_text())
    assert kept["steps"] == 8
