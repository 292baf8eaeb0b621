"""`gradmap prune` and `gradmap eval` on the command line: plans that can be recomputed, and
refusals."""

import json
import math

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.methods.gradmap.scores import gradient_scores_reference
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import sample_losses
from gradmap.pruning.budget import LEAST_SAMPLES
from gradmap.pruning.plan import load_calibration_ids, load_changes, load_plan, require_same_model
from tests.command_line import gradmap
from tests.conftest import BOS
from tests.families import LAYERS
from tests.gradmap.removals import pairs


def prune_arguments(pico, word_file, out, remove=2):
    source = ("--calibration", f"file:{word_file}", "--samples", 12, "--tokens", 16)
    options = ("--preset", "gradmap", "--dtype", "float64", "--out", out)
    return ("prune", "--model", pico.directory, "--remove", remove, *source, *options)


@pytest.fixture(scope="module")
def planned(picos, word_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("prune") / "plan"
    finished = gradmap(*prune_arguments(picos["llama"], word_file, out), "--json")
    assert finished.returncode == 0, finished.stderr
    return picos["llama"], out, finished


def test_the_plan_can_be_recomputed_from_its_own_files(planned):
    pico, out, finished = planned
    plan = load_plan(out)
    input_ids = load_calibration_ids(out, plan)
    model = pico.load()
    told = json.loads(finished.stdout.splitlines()[-1])
    assert pairs(*told["removal_order"]) == tuple(plan.removal_order)
    assert len(plan.removal_order) == len(set(plan.removal_order)) == 2
    for number, step in enumerate(plan.steps):
        removed = plan.removal_order[:number]
        with LayeredModel.of(model).without(removed):
            expected = gradient_scores_reference(LayeredModel.of(model), input_ids)
        alive = [pair for pair in pairs(*range(LAYERS)) if pair not in removed]
        assert list(step.scores) == alive
        torch.testing.assert_close(
            torch.tensor(list(step.scores.values()), dtype=torch.float64),
            expected,
            rtol=1e-7,
            atol=0,
        )
        assert step.removed == [alive[int(expected.argmin())]]


def test_plan_json_keeps_the_agreed_names(planned):
    contents = json.loads((planned[1] / "plan.json").read_text())
    assert {
        "removal_order",
        "steps",
        "corrections",
        "calibration",
        "recipe",
        "base_model",
    } <= contents.keys()
    (correction,) = contents["corrections"]
    assert {
        "layer",
        "target",
        "lambda",
        "held_out_divergence_before",
        "held_out_divergence_after",
    } <= correction.keys()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_plan_tells_what_each_stage_took(picos, word_file, tmp_path, device):
    finished = gradmap(
        *prune_arguments(picos["llama"], word_file, tmp_path / "plan"), "--device", device
    )
    assert finished.returncode == 0, finished.stderr
    plan = load_plan(tmp_path / "plan")
    assert list(plan.timings_s) == ["select", "compensate"]
    assert list(plan.peak_gpu_bytes) == (["select", "compensate"] if device == "cuda" else [])
    weights = sum(parameter.nbytes for parameter in picos["llama"].load().parameters())
    assert all(peak > weights for peak in plan.peak_gpu_bytes.values())


def evaluate_plan(pico, plan, text, *options):
    """The dense and the pruned model on one text, in float64."""
    model = ("--model", pico.directory, "--plan", plan, "--dtype", "float64")
    return gradmap("eval", *model, "--perplexity", f"own=file:{text}", *options)


def test_eval_measures_dense_and_pruned(planned, tmp_path):
    pico, plan, _ = planned
    (tmp_path / "other.txt").write_text(
        " ".join(f"w{3 + (7 * index) % 190}" for index in range(400))
    )
    out = tmp_path / "eval.json"
    asked = ("--segment", 64, "--out", out)
    finished = evaluate_plan(pico, plan, tmp_path / "other.txt", *asked)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(out.read_text())
    assert (result["dense"]["layers"], result["pruned"]["layers"]) == (LAYERS, LAYERS - 2)
    ids = torch.tensor([[3 + (7 * index) % 190 for index in range(384)]]).reshape(6, 64)
    losses = sample_losses(pico.load()(input_ids=ids).logits, ids) / 63
    estimate = result["dense"]["perplexity"]["own"]
    assert estimate["value"] == pytest.approx(losses.mean().exp().item(), rel=1e-9)
    assert estimate["stderr"] == pytest.approx(
        estimate["value"] * losses.std().item() / math.sqrt(6), rel=1e-9
    )


@pytest.fixture(scope="module")
def planned_with_bos(pico_with_bos, word_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("bos") / "plan"
    assert (
        gradmap(
            *prune_arguments(pico_with_bos, word_file, out), "--selector", "gradient"
        ).returncode
        == 0
    )
    return pico_with_bos, out


def test_a_plan_is_made_of_samples_that_begin_with_bos(planned_with_bos, tmp_path):
    pico, out = planned_with_bos
    plan = load_plan(out)
    input_ids = load_calibration_ids(out, plan)
    assert (plan.calibration.bos, plan.calibration.tokens) == (BOS, 16)
    assert input_ids.shape == (12, 16)
    assert set(input_ids[:, 0].tolist()) == {BOS}
    expected = gradient_scores_reference(pico.layered(), input_ids)
    assert list(plan.steps[0].scores.values()) == pytest.approx(expected.tolist(), rel=1e-7)
    options = (
        "--from-plan",
        out,
        "--remove",
        1,
        "--compensator",
        "distil",
        "--out",
        tmp_path / "smaller",
    )
    finished = gradmap("prune", "--model", pico.directory, *options)
    assert finished.returncode == 0, finished.stderr
    smaller = load_plan(tmp_path / "smaller").calibration
    assert (smaller.sha256, smaller.bos) == (plan.calibration.sha256, BOS)


def test_a_tokenizer_without_bos_is_recorded_as_such(planned):
    assert json.loads((planned[1] / "plan.json").read_text())["calibration"]["bos"] is None


def test_eval_puts_bos_before_every_segment(planned_with_bos, tmp_path):
    pico, plan = planned_with_bos
    tokens = [3 + (7 * index) % 190 for index in range(384)]
    (tmp_path / "other.txt").write_text(" ".join(f"w{token}" for token in tokens))
    asked = ("--segment", 48, "--limit", 5, "--out", tmp_path / "eval.json")
    finished = evaluate_plan(pico, plan, tmp_path / "other.txt", *asked)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "eval.json").read_text())
    text = result["texts"]["own"]
    assert (text["segments"], text["tokens"], text["bos"], text["predicted_tokens"]) == (
        5,
        48,
        BOS,
        48,
    )
    segments = torch.tensor(tokens[: 5 * 48]).reshape(5, 48)
    ids = torch.cat([torch.full((5, 1), BOS), segments], dim=1)
    losses = sample_losses(pico.load()(input_ids=ids).logits, ids) / 48
    assert result["dense"]["perplexity"]["own"]["value"] == pytest.approx(
        losses.mean().exp().item(), rel=1e-9
    )


def test_evaluating_on_the_calibration_text_is_refused(planned, word_file, tmp_path):
    pico, plan, _ = planned
    text = ("--perplexity", f"file:{word_file}", "--out", tmp_path / "eval.json")
    finished = gradmap("eval", "--model", pico.directory, "--plan", plan, *text)
    assert finished.returncode == 2
    assert "used for calibration" in finished.stderr
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--remove": LAYERS}, f"Cannot remove {LAYERS} of the {LAYERS} layers"),
        ({"--remove": 0}, "remove between 1 and"),
        ({"--model": "./nowhere"}, "does not exist"),
        ({"--samples": 5000}, "too short"),
        ({"--selector": "magic"}, "Unknown selector"),
        ({"--preset": "magic"}, "Unknown preset"),
        ({"--dtype": "int3"}, "Unknown dtype"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(picos, word_file, tmp_path, changes, message):
    arguments = list(prune_arguments(picos["llama"], word_file, tmp_path / "plan"))
    for option, value in changes.items():
        arguments += [option, value]  # the last one counts
    finished = gradmap(*arguments)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert finished.stderr.count("\n") == 1, finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_refused_for_another_model(planned, picos):
    with pytest.raises(UserError, match="made for another model"):
        require_same_model(load_plan(planned[1]), picos["mistral"].checkpoint)


def test_a_tampered_plan_is_refused(planned, tmp_path):
    contents = json.loads((planned[1] / "plan.json").read_text())
    for key, value, message in (
        ("schema_version", 99, "schema 99"),
        ("schema_version", 3, "plan schema 3, this version reads 5 to 8; prune again"),
        ("removal_order", contents["removal_order"][::-1], "contradicts itself"),
        ("surprise", 1, "surprise"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(contents | {key: value}))
        with pytest.raises(UserError, match=message):
            load_plan(tmp_path)


def test_a_rejected_correction_is_not_loaded(planned):
    plan = load_plan(planned[1])
    rejected = plan.model_copy(
        update={
            "corrections": [one.model_copy(update={"accepted": False}) for one in plan.corrections]
        }
    )
    assert load_changes(planned[1], rejected) == {}


def test_the_published_method_fits_on_all_samples_and_applies_what_it_fitted(planned):
    plan = load_plan(planned[1])
    assert plan.calibration.held_out_samples == 0
    (correction,) = plan.corrections
    assert correction.accepted
    assert correction.held_out_divergence_after is None
    assert "nothing was held out to judge it by" in plan.correction_groups[0].describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("--selector", "repair", "--held-out", 0),
            "repair chooses by what it does on held-out samples",
        ),
        (
            ("--compensator", "refit", "--held-out", 0),
            "refit chooses by what it does on held-out samples",
        ),
        (("--accept", "held-out"), "give --accept always"),
        (("--accept", "never"), "is not one of 'held-out', 'always'"),
        (("--held-out", 12), "leaves none to fit on"),
    ],
)
def test_what_held_out_samples_are_needed_for_is_said(picos, word_file, tmp_path, changes, message):
    finished = gradmap(*prune_arguments(picos["llama"], word_file, tmp_path / "plan"), *changes)
    assert finished.returncode == 2
    assert message in finished.stderr


def test_a_preset_with_another_method_holds_out_what_that_needs(picos, word_file, tmp_path):
    arguments = prune_arguments(picos["llama"], word_file, tmp_path / "plan")
    assert gradmap(*arguments, "--compensator", "refit", "--held-out", 2).returncode == 0
    plan = load_plan(tmp_path / "plan")
    assert (plan.recipe["selector"], plan.recipe["accept"], plan.calibration.held_out_samples) == (
        "gradient",
        "held-out",
        2,
    )


@pytest.mark.parametrize(("minutes", "samples"), [(1e-9, LEAST_SAMPLES), (1e9, 24)])
def test_a_budget_scales_the_samples_to_what_the_machine_manages(
    picos, word_file, tmp_path, minutes, samples
):
    out = tmp_path / "plan"
    arguments = prune_arguments(picos["llama"], word_file, out)
    finished = gradmap(*arguments, "--samples", 24, "--budget-minutes", minutes)
    assert finished.returncode == 0, finished.stderr
    plan = load_plan(out)
    assert (plan.calibration.samples, plan.recipe["samples"]) == (samples, 24)
    assert f"{samples} of 24, within a budget of {minutes:g} minutes" in " ".join(
        finished.stdout.split()
    )
    assert ("is estimated to manage" in finished.stderr) is (samples < 24)


def test_a_budget_needs_methods_whose_costs_are_known(picos, word_file, tmp_path):
    arguments = prune_arguments(picos["llama"], word_file, tmp_path / "plan")
    finished = gradmap(*arguments, "--budget-minutes", "1", "--selector", "mka")
    assert finished.returncode == 2
    assert "What mka and projection cost is not known" in finished.stderr
