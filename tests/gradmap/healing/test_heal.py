"""`gradmap heal`: a plan becomes a better one."""

import json

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.common.flags import flags_of
from gradmap.evaluation.contamination import GRAM_TOKENS, CalibratedOn
from gradmap.model.corrections import LowRank
from gradmap.model.loading import load_tokenizer
from gradmap.pruning.plan import load_changes, load_plan
from tests.command_line import gradmap
from tests.gradmap.healing.small_healings import (
    STEP,
    TOKENS,
    asking,
    divergence_of,
    heal_pico,
    sentence,
)


def held_out_ids(pico, options):
    return options.mixture.open(load_tokenizer(pico.directory)).held_out


@pytest.mark.parametrize("train", ["low-rank", "full"])
@pytest.mark.parametrize("compensator", ["none", "distil"])
def test_a_healed_plan_is_nearer_to_the_dense_model(
    picos, plans, texts, tmp_path, compensator, train
):
    options = asking(texts, train=train)
    healed = heal_pico(picos, plans[compensator], options, tmp_path / "healed")
    (record,) = healed.healing
    ids = held_out_ids(picos["llama"], options)
    before = divergence_of(picos["llama"], plans[compensator], ids)
    after = divergence_of(picos["llama"], tmp_path / "healed", ids)
    # corrections are stored in float32
    assert record.curve[0].held_out_divergence == pytest.approx(before, rel=1e-5)
    assert record.lowest_divergence == pytest.approx(after, rel=1e-5)
    assert after < 0.9 * before
    assert load_plan(tmp_path / "healed") == healed


@pytest.mark.gpu
@pytest.mark.parametrize("train", ["low-rank", "full"])
def test_a_gpu_heals_as_a_cpu_does(picos, plans, texts, tmp_path, train):
    asked = asking(texts, budget_tokens=6 * STEP, train=train)
    cpu, gpu = (
        heal_pico(
            picos, plans["distil"], asked.model_copy(update={"device": device}), tmp_path / device
        )
        for device in ("cpu", "cuda")
    )
    for one, other in zip(gpu.healing[0].curve, cpu.healing[0].curve, strict=True):
        # the loss is computed in float32
        assert one.held_out_divergence == pytest.approx(other.held_out_divergence, rel=1e-4)
    assert gpu.peak_gpu_bytes["heal"] > 0


def test_the_corrections_that_a_plan_has_are_gone_on_with(picos, plans, texts, tmp_path):
    """Its low-rank ones become part of those that are trained; the others stay."""
    heal_pico(picos, plans["distil"], asking(texts, rank=20), tmp_path / "healed")
    before, after = (
        load_changes(plan, load_plan(plan)) for plan in (plans["distil"], tmp_path / "healed")
    )
    assert any(len(of_place) == 2 for of_place in before.values())
    for place, of_place in after.items():
        (factors,) = (change for change in of_place if isinstance(change, LowRank))
        assert factors.down.shape[0] == 20
        others = [change for change in of_place if change is not factors]
        known = [change for change in before.get(place, ()) if not isinstance(change, LowRank)]
        assert [change.kind for change in others] == [change.kind for change in known]
        for other, change in zip(others, known, strict=True):
            assert torch.equal(other.tensors["matrix"], change.tensors["matrix"])


def test_training_that_does_not_help_is_left_out(picos, plans, texts, tmp_path):
    out = tmp_path / "healed"
    options = asking(texts, learning_rate=20.0, budget_tokens=2 * STEP)
    healed = heal_pico(picos, plans["distil"], options, out)
    assert healed.healing[0].lowest_divergence == healed.healing[0].curve[0].held_out_divergence
    assert "left out" in healed.correction_groups[-1].describe()
    before, after = (load_changes(plan, load_plan(plan)) for plan in (plans["distil"], out))
    assert before.keys() == after.keys()
    for place, of_place in before.items():
        for one, other in zip(of_place, after[place], strict=True):
            for name, tensor in one.tensors.items():
                assert torch.equal(tensor, other.tensors[name])


@pytest.mark.parametrize("train", ["low-rank", "full"])
def test_layers_run_again_where_memory_is_short_and_give_the_same(
    picos, plans, texts, tmp_path, capsys, monkeypatch, train
):
    options = asking(texts, budget_tokens=6 * STEP, train=train)
    usual = heal_pico(picos, plans["distil"], options, tmp_path / "usual")
    assert "run again" not in capsys.readouterr().err
    monkeypatch.setattr("gradmap.model.batching.CPU_ACTIVATION_BYTES", 1 << 16)
    scarce = heal_pico(picos, plans["distil"], options, tmp_path / "scarce")
    assert "layers are run again for the backward pass" in capsys.readouterr().err
    for one, other in zip(scarce.healing[0].curve, usual.healing[0].curve, strict=True):
        # of a sample at a time, in another order; the loss is computed in float32
        assert one.held_out_divergence == pytest.approx(other.held_out_divergence, rel=1e-4)


def test_a_budget_of_minutes_is_kept(picos, plans, texts, tmp_path, monkeypatch):
    """By a clock that goes on by three seconds whenever it is looked at."""
    seconds = iter(range(0, 10_000, 3))
    monkeypatch.setattr("gradmap.healing.trainer.time.monotonic", lambda: next(seconds))
    options = asking(texts, budget_tokens=None, budget_minutes=2.0)
    curve = heal_pico(picos, plans["none"], options, tmp_path / "healed").healing[0].curve
    assert 120 <= curve[-1].seconds < 120 + 3 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_tokens": None}, "give --budget-tokens or --budget-minutes"),
        ({"budget_minutes": 1.0}, "give --budget-tokens or --budget-minutes"),
        ({"budget_tokens": STEP - 1}, "less than one step of 64"),
        ({"mix": [1.0, 2.0]}, "2 weights for 1 texts"),
        ({"mix": [1.0], "written": 9}, "1 weights for 2 texts.* for --written the last"),
        ({"text": ["file:a.txt", "file:a.txt"]}, "given twice"),
        ({"mix": [0.0]}, "greater than 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(texts, changes, message):
    with pytest.raises(ValueError, match=message):
        asking(texts, **changes)


@pytest.mark.parametrize("train", ["low-rank", "full"])
def test_the_command_writes_a_plan_that_is_exported_and_evaluated(
    picos, plans, texts, tmp_path, train
):
    pico, out = picos["llama"], tmp_path / "healed"
    model = ("--model", pico.directory)
    options = asking(texts, budget_tokens=40 * STEP, train=train)
    wanted = ("--plan", plans["none"], *flags_of(options), "--out", out, "--json")
    finished = gradmap("heal", *model, *wanted)
    assert finished.returncode == 0, finished.stderr
    assert "held-out divergence" in finished.stdout
    told = json.loads(finished.stdout.splitlines()[-1])
    assert told["curve"][-1]["tokens"] == options.budget_tokens
    assert "twice the tokens" in finished.stdout
    assert [more["times"] for more in told["forecasts"]] == [2, 4]
    exported = gradmap("export", *model, "--plan", out, "--format", "hf", "--out", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    for pruned in (("--plan", out), ("--pruned", tmp_path / "out" / "hf")):
        own = gradmap("eval", *model, *pruned, *evaluating(texts, tmp_path))
        assert own.returncode == 2
        assert "healing.jsonl was used for healing; evaluate on other text" in own.stderr
        copy = tmp_path / "copy.jsonl"
        copy.write_bytes(texts.read_bytes())
        copied = gradmap("eval", *model, *pruned, *evaluating(copy, tmp_path))
        assert copied.returncode == 2
        assert "overlaps with the healing samples" in copied.stderr


def test_tasks_leave_out_whatever_was_trained_on_or_held_out(picos, plans, texts, tmp_path):
    """Texts to know documents by have words of one document each."""
    options = asking(texts)
    heal_pico(picos, plans["none"], options, tmp_path / "healed")
    tokenizer = load_tokenizer(picos["llama"].directory)
    known = CalibratedOn.of_plan(plans["none"], tokenizer).texts
    healed = CalibratedOn.of_plan(tmp_path / "healed", tokenizer).texts
    assert healed[: len(known)] == known
    documents = [sentence(start) for start in range(400)]
    assert all(any(text in document for document in documents) for text in healed[len(known) :])
    samples = options.mixture.open(tokenizer)
    for sample in (*samples.draw(24 * STEP // TOKENS), *samples.held_out):
        pieces = tokenizer.decode(sample).split("</s>")
        longest = max(pieces, key=lambda piece: len(piece.split()))
        assert (longest.strip() in healed) == (len(longest.split()) >= GRAM_TOKENS)


def test_a_record_of_healing_that_cannot_be_is_refused(picos, plans, texts, tmp_path):
    heal_pico(picos, plans["none"], asking(texts, budget_tokens=STEP), tmp_path / "healed")
    file = tmp_path / "healed" / "plan.json"
    contents = json.loads(file.read_text())
    contents["healing"][0]["recipe"]["tokens"] = "many"
    file.write_text(json.dumps(contents))
    with pytest.raises(UserError, match=r"plan\.json: .*tokens"):
        CalibratedOn.of_plan(file.parent, load_tokenizer(picos["llama"].directory))


def evaluating(text, directory):
    return ("--perplexity", f"own=file:{text}", "--segment", 32, "--out", directory / "eval.json")
