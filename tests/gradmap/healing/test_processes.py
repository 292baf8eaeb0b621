"""Several processes heal as one does, and may share the weights."""

import pytest

from gradmap.common.errors import UserError
from gradmap.common.flags import flags_of
from gradmap.pruning.plan import load_plan
from tests.gradmap.healing.small_healings import STEP, KilledError, asking, heal_pico
from tests.gradmap.model.test_distributed import in_two_processes


@pytest.mark.parametrize(
    ("train", "shard"), [("low-rank", False), ("low-rank", True), ("full", False), ("full", True)]
)
def test_two_processes_heal_as_one(picos, plans, texts, tmp_path, train, shard):
    options = asking(texts, budget_tokens=6 * STEP, train=train)
    alone = heal_pico(picos, plans["distil"], options, tmp_path / "alone")
    model = ("--model", picos["llama"].directory, "--plan", plans["distil"])
    sharing = options.model_copy(update={"shard": shard})
    in_two_processes("heal", *model, *flags_of(sharing), "--out", tmp_path / "together")
    together = load_plan(tmp_path / "together")
    # float64 sums in another order; the loss is computed in float32, and Adam's first steps are
    # of the gradients' signs
    for one, other in zip(together.healing[0].curve, alone.healing[0].curve, strict=True):
        assert one.held_out_divergence == pytest.approx(other.held_out_divergence, rel=1e-4)
    assert together.healing[0].sha256 == alone.healing[0].sha256
    assert len(together.corrections) == len(alone.corrections)


def test_weights_in_bfloat16_are_shared_with_updates_in_float32(picos, plans, texts, tmp_path):
    options = asking(texts, budget_tokens=12 * STEP, train="full", dtype="bfloat16")
    alone = heal_pico(picos, plans["none"], options, tmp_path / "alone")
    model = ("--model", picos["llama"].directory, "--plan", plans["none"])
    sharing = flags_of(options.model_copy(update={"shard": True}))
    in_two_processes("heal", *model, *sharing, "--out", tmp_path / "together")
    together = load_plan(tmp_path / "together")
    assert together.healing[0].lowest_divergence < together.healing[0].curve[0].held_out_divergence
    for one, other in zip(together.healing[0].curve, alone.healing[0].curve, strict=True):
        # what a layer gives is rounded to 8 bits, in sums of another order
        assert one.held_out_divergence == pytest.approx(other.held_out_divergence, rel=2**-6)


def test_several_processes_that_share_the_weights_go_on_with_what_one_began(
    picos, plans, texts, tmp_path, request
):
    options = asking(texts, budget_tokens=30 * STEP, train="full")
    whole = heal_pico(picos, plans["none"], options, tmp_path / "whole")
    request.getfixturevalue("killed_after_two_rounds")
    out = tmp_path / "healed"
    with pytest.raises(KilledError):
        heal_pico(picos, plans["none"], options, out)
    model = ("--model", picos["llama"].directory, "--plan", plans["none"])
    sharing = flags_of(options.model_copy(update={"shard": True}))
    finished = in_two_processes("heal", *model, *sharing, "--out", out, "--resume")
    assert "Going on after 16 steps" in finished.stderr
    for one, other in zip(load_plan(out).healing[0].curve, whole.healing[0].curve, strict=True):
        assert one.held_out_divergence == pytest.approx(other.held_out_divergence, rel=1e-4)


@pytest.mark.parametrize(
    ("processes", "changes", "message"),
    [
        (1, {}, "--shard shares weights among several processes"),
        (3, {}, "not multiples of 3 processes"),
        (2, {"held_out": 7}, "7 --held-out samples are not multiples of 2 processes"),
    ],
)
def test_weights_are_shared_by_processes_that_do_as_much(
    picos, plans, texts, tmp_path, monkeypatch, processes, changes, message
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=message):
        heal_pico(picos, plans["none"], asking(texts, shard=True, **changes), tmp_path / "healed")
