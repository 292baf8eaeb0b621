"""`gradmap heal`: a plan becomes a better one, and a run that was killed becomes the same."""

import json
import math

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.common.flags import flags_of
from gradmap.evaluation.contamination import GRAM_TOKENS, CalibratedOn
from gradmap.healing import kept_training
from gradmap.healing.heal import heal
from gradmap.healing.kept_training import KeptTraining
from gradmap.healing.options import HealOptions
from gradmap.methods import distillation
from gradmap.model.corrections import LowRank
from gradmap.model.layerwise import sample_divergences
from gradmap.model.loading import load_tokenizer
from gradmap.pruning.plan import load_changes, load_plan
from gradmap.pruning.prune import prune
from gradmap.pruning.settings import PruneSettings
from tests.command_line import gradmap
from tests.gradmap.model.test_distributed import in_two_processes

TOKENS, STEP = 16, 64


def sentence(start):
    """Words that follow each other by a rule, so that there is something to learn."""
    stride = 7 * (1 + start % 3)
    return " ".join(f"w{3 + (start + stride * place) % 190}" for place in range(20 + start % 9))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "healing.jsonl"
    path.write_text("\n".join(json.dumps({"text": sentence(start)}) for start in range(400)))
    return path


@pytest.fixture(scope="module")
def plans(picos, word_file, tmp_path_factory):
    """By compensator, of the same model and removals."""
    made = {}
    for compensator in ("none", "distil"):
        made[compensator] = tmp_path_factory.mktemp("plans") / compensator
        settings = PruneSettings(
            selector="manual",
            layers=["1", "3"],
            compensator=compensator,
            remove=2,
            calibration=f"file:{word_file}",
            samples=12,
            tokens=TOKENS,
            dtype="float64",
        )
        prune(picos["llama"].checkpoint, settings, made[compensator])
    return made


def asking(texts, **changes):
    asked = {
        "text": [f"file:{texts}"],
        "tokens": TOKENS,
        "step_tokens": STEP,
        "budget_tokens": 24 * STEP,
        "rank": 4,
        "learning_rate": 5e-3,
        "held_out": 8,
        "dtype": "float64",
    }
    return HealOptions(**(asked | changes))


def heal_pico(picos, plan, options, out, resume=None):
    return heal(picos["llama"].checkpoint, plan, options, out, resume)


def divergence_of(pico, directory, input_ids):
    """From the dense model, of the model as the plan leaves it: mean over positions."""
    plan, model = load_plan(directory), pico.layered()
    with torch.no_grad():
        dense = model.network(input_ids=input_ids).logits
        with model.changed(load_changes(directory, plan), without=plan.removal_order):
            pruned = model.network(input_ids=input_ids, use_cache=False).logits
    return sample_divergences(pruned, dense).sum().item() / input_ids.numel()


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


class KilledError(Exception):
    pass


@pytest.fixture
def killed_after_two_rounds(monkeypatch):
    """Which keep what they did; the third is lost."""
    monkeypatch.setattr(kept_training, "KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(kept_training, "WRITING_SHARE", math.inf)
    rounds: list[object] = []
    keep = KeptTraining.keep

    def keep_or_die(self, trainer):
        if len(rounds) == 2:
            rounds.clear()
            monkeypatch.setattr(KeptTraining, "keep", keep)
            raise KilledError
        rounds.append(trainer)
        keep(self, trainer)

    monkeypatch.setattr(KeptTraining, "keep", keep_or_die)


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


def test_the_command_writes_a_plan_that_is_exported_and_evaluated(
    picos, plans, texts, word_file, tmp_path
):
    pico, out = picos["llama"], tmp_path / "healed"
    model = ("--model", pico.directory)
    options = asking(texts, budget_tokens=40 * STEP)
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
