"""Every selector scores what it says, by hand or by a slow reference, and leaves the model as it
was."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from gradmap.common.errors import UserError
from gradmap.data.calibration import build_calibration
from gradmap.methods.compensation import run_and_capture
from gradmap.methods.registry import selector_names
from gradmap.methods.selection import Selection, Subject, select
from gradmap.methods.shortened_llama import taylor_scores
from gradmap.methods.shortgpt import block_influences
from gradmap.methods.sleb import losses_without, losses_without_reference
from gradmap.methods.streamline import block_influences_reference
from gradmap.methods.uidl import angular_distances, angular_distances_reference, last_angles
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_model, load_tokenizer
from gradmap.model.precision import computing_in
from gradmap.model.sublayers import Pair
from tests.command_line import gradmap
from tests.conftest import BOOLQ, perplexity_of_plan
from tests.families import LAYERS
from tests.gradmap.named_methods import NOT_NESTED, make_scorer
from tests.gradmap.pruning.test_prune import prune_arguments
from tests.gradmap.removals import pairs
from tests.gradmap.subjects import subject_of


def choose(name, subject, count, done=(), one_shot=False, **options):
    steps: list = []
    one_shot, subject = one_shot or name in NOT_NESTED, replace(subject, count=count)
    selection = select(
        lambda: make_scorer(name, subject, **options),
        subject,
        count,
        one_shot=one_shot,
        done=list(done),
        record=steps.append,
    )
    assert list(selection.steps)[len(done) :] == steps
    return selection


@pytest.mark.parametrize("name", sorted(set(selector_names()) - {"manual", "repair", *NOT_NESTED}))
def test_the_lowest_score_goes_and_the_model_stays_whole(pico, input_ids, name):
    if name == "laco" and pico.architecture.expert_down_projections is not None:
        pytest.skip("experts are not merged")
    subject = subject_of(pico, input_ids)
    before = subject.model.network(input_ids=input_ids).logits
    selection = choose(name, subject, 3)
    assert len(set(selection.removal_order)) == 3
    for number, step in enumerate(selection.steps):
        assert not set(step.scores) & set(selection.removal_order[:number])
        assert step.removed == (min(step.scores, key=step.scores.get),)
    assert torch.equal(subject.model.network(input_ids=input_ids).logits, before)
    assert not any(parameter.requires_grad for parameter in subject.model.network.parameters())


@pytest.mark.parametrize("name", sorted(set(selector_names()) - {"manual", *NOT_NESTED}))
def test_protected_layers_stay_and_a_stopped_run_goes_on_the_same(picos, input_ids, name):
    subject = subject_of(picos["llama"], input_ids, protected=frozenset({0, 2}))
    selection = choose(name, subject, 2)
    assert set(selection.removal_order) <= set(pairs(1, 3, 4))
    assert choose(name, subject, 2, done=selection.steps[:1]) == selection
    with pytest.raises(UserError, match="may still be removed"):
        choose(name, subject, 4)


@pytest.mark.parametrize("name", sorted(set(selector_names()) - {"manual", *NOT_NESTED}))
def test_a_longer_order_begins_like_a_shorter_one(picos, input_ids, name):
    longer, shorter = (
        choose(name, subject_of(picos["llama"], input_ids), count).removal_order for count in (3, 2)
    )
    assert longer[:2] == shorter


@pytest.mark.parametrize("name", sorted(selector_names()))
def test_a_round_takes_the_work_that_was_announced(picos, input_ids, name):
    options = {"layers": pairs(3, 1)} if name == "manual" else {}
    scorer = make_scorer(name, subject_of(picos["llama"], input_ids, count=2), **options)
    done: list = []
    scorer.score(Selection(()), done.append)
    assert sum(done) == scorer.work(LAYERS)


def test_block_influence_is_one_minus_the_mean_cosine(pico, input_ids):
    model = pico.load()
    layers = list(pico.architecture.layer_list(model))
    expected = []
    for entering, leaving in run_and_capture(LayeredModel.of(model), layers, input_ids):
        cosines = [
            cosine_similarity(h, g, dim=0)
            for h, g in zip(entering.flatten(0, 1), leaving.flatten(0, 1), strict=True)
        ]
        expected.append(1 - torch.stack(cosines).mean())
    torch.testing.assert_close(
        block_influences(LayeredModel.of(model), input_ids), torch.stack(expected)
    )


def test_removal_losses_are_those_of_whole_smaller_models(pico, input_ids):
    model = pico.load()
    places = [1, 2, 3]
    torch.testing.assert_close(
        losses_without(LayeredModel.of(model), input_ids, places),
        torch.tensor(
            losses_without_reference(LayeredModel.of(model), input_ids, pairs(*places)),
            dtype=torch.float64,
        ),
        rtol=1e-6,  # the loss is summed in float32
        atol=0,
    )


def test_sleb_keeps_the_first_and_the_last_layer(picos, input_ids):
    scores = choose("sleb", subject_of(picos["llama"], input_ids), 1).steps[0].scores
    assert set(scores) == set(pairs(*range(1, LAYERS - 1)))


def test_taylor_is_weight_times_gradient(picos, input_ids):
    pico = picos["llama"]
    model = pico.load()
    actual = taylor_scores(LayeredModel.of(model), input_ids).tolist()
    model.requires_grad_(True)
    logits = model(input_ids=input_ids).logits[:, :-1]
    cross_entropy(logits.flatten(end_dim=1), input_ids[:, 1:].flatten(), reduction="sum").backward()
    expected = [
        sum((p * p.grad).abs().sum().item() for p in layer.parameters())
        for layer in pico.architecture.layer_list(model)
    ]
    assert actual == pytest.approx(expected, rel=1e-5)  # the loss's own gradient is float32


def test_magnitude_is_the_sum_of_absolute_weights(picos, input_ids):
    pico = picos["gpt2"]
    (step,) = choose("magnitude", subject_of(pico, input_ids), 1).steps
    layer = pico.architecture.layer_list(pico.load())[2]
    maps = (
        layer.attn.c_attn,
        layer.attn.c_proj,
        layer.mlp.c_fc,
        layer.mlp.c_proj,
        layer.ln_1,
        layer.ln_2,
    )
    expected = sum(
        module.weight.abs().sum().item() + module.bias.abs().sum().item() for module in maps
    )
    assert step.scores[Pair.of_layer(2)] == pytest.approx(expected)


def test_orders_that_measure_nothing(picos, input_ids):
    assert choose(
        "manual", subject_of(picos["llama"], input_ids), 2, layers=pairs(4, 1, 2)
    ).removal_order == pairs(4, 1)
    drawn = [
        choose("random", subject_of(picos["llama"], input_ids), LAYERS - 1).removal_order
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    for order in ((1, 1), (9,)):
        with pytest.raises(UserError, match="--layers must name distinct layers"):
            make_scorer("manual", subject_of(picos["llama"], input_ids), layers=pairs(*order))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--selector", "manual"), "--layers is the order of removal"),
        (("--layers", "1,2"), "--layers is the order of removal"),
        (
            ("--selector", "manual", "--layers", "1,a"),
            "'a' is neither a layer such as 7 nor a pair",
        ),
        (
            ("--selector", "manual", "--layers", "1,7"),
            "--layers must name distinct layers between 0 and 4",
        ),
        (("--selector", "repair", "--stream"), "needs all weights in memory"),
        (("--selector", "taylor", "--stream"), "needs all weights in memory"),
        (("--compensator", "distil", "--stream"), "needs all weights in memory"),
        (("--protect-first", 2, "--protect-last", 2), "4 of the 5 layers are protected"),
    ],
)
def test_what_a_selector_cannot_do_is_refused(picos, word_file, tmp_path, changes, message):
    finished = gradmap(*prune_arguments(picos["llama"], word_file, tmp_path / "plan"), *changes)
    assert finished.returncode == 2
    assert message in finished.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_plan_of_our_own_can_be_evaluated(picos, word_file, tmp_path, family):
    arguments = prune_arguments(picos[family], word_file, tmp_path / "plan")
    finished = gradmap(*arguments, "--preset", "best")
    assert finished.returncode == 0, finished.stderr
    (tmp_path / "other.txt").write_text(
        " ".join(f"w{3 + (7 * index) % 190}" for index in range(400))
    )
    text = ("--perplexity", f"own=file:{tmp_path}/other.txt", "--segment", 16, "--dtype", "float64")
    out = tmp_path / "eval.json"
    finished = gradmap(
        *(
            "eval",
            "--model",
            picos[family].directory,
            "--plan",
            tmp_path / "plan",
            *text,
            "--out",
            out,
        )
    )
    assert finished.returncode == 0, finished.stderr
    ids = torch.tensor([3 + (7 * index) % 190 for index in range(400)]).reshape(25, 16)
    measured = json.loads(out.read_text())["pruned"]["perplexity"]["own"]["value"]
    assert measured == pytest.approx(
        perplexity_of_plan(picos[family], tmp_path / "plan", ids), rel=1e-6
    )


BLOCKS = {
    "window": (block_influences, block_influences_reference),
    "uidl": (angular_distances, angular_distances_reference),
}


@pytest.mark.parametrize("count", [1, 2, LAYERS - 1])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_that_turns_the_hidden_state_least_goes(pico, input_ids, name, count):
    subject = subject_of(pico, input_ids)
    measure, by_reference = BLOCKS[name]
    turns = measure(subject.model, input_ids, count=count).tolist()
    reference = by_reference(subject.model.network, input_ids, count)
    assert turns[:-1] == pytest.approx(reference, rel=1e-9, abs=1e-12)
    first = turns.index(min(turns))
    selection = choose(name, subject, count)
    assert selection.removal_order == pairs(*range(first, first + count))
    assert len(selection.steps) == 1


def test_angles_are_those_of_the_last_tokens_as_shares_of_half_a_turn():
    entering = torch.tensor([[[9.0, 9.0], [1.0, 0.0]]]).expand(4, 2, 2)
    last = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    leaving = torch.stack([torch.full_like(last, -9.0), last], dim=1)
    angles = last_angles(entering, leaving)
    assert angles.item() == pytest.approx(0 + 1 / 4 + 1 / 2 + 1, rel=1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_keeps_to_the_layers_that_may_go(picos, input_ids, name):
    protected = frozenset({0, LAYERS - 1})
    subject = subject_of(picos["gpt2"], input_ids, protected=protected)
    assert choose(name, subject, LAYERS - 2).removal_order == pairs(*range(1, LAYERS - 1))
    with pytest.raises(UserError, match="leave no 2 consecutive ones"):
        choose(name, replace(subject, protected=frozenset(range(0, LAYERS, 2))), 2)


@pytest.mark.parametrize("name", BLOCKS)
def test_of_equal_blocks_the_first_one_goes(picos, input_ids, name):
    subject = subject_of(picos["llama"], input_ids)
    for layer in subject.model.layers:
        for parameter in layer.parameters():
            parameter.zero_()  # no layer adds anything
    assert choose(name, subject, 3).removal_order == pairs(0, 1, 2)


@pytest.mark.parametrize("unit", ["layer", "pair"])
def test_the_last_layers_go_from_the_end(picos, input_ids, unit):
    subject = subject_of(picos["llama"], input_ids, unit=unit)
    assert choose("last", subject, 3).removal_order == pairs(4, 3, 2)
    protected = replace(subject, protected=frozenset({LAYERS - 1}))
    assert choose("last", protected, 2).removal_order == pairs(3, 2)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_for_fewer_layers_is_chosen_anew(picos, word_file, tmp_path, name):
    larger = prune_arguments(picos["llama"], word_file, tmp_path / "plan", remove=3)
    assert gradmap(*larger, "--selector", name).returncode == 0
    of_larger = ("prune", "--model", picos["llama"].directory, "--from-plan", tmp_path / "plan")
    finished = gradmap(*of_larger, "--remove", 2, "--out", tmp_path / "fewer")
    assert finished.returncode == 2
    assert "does not hold that choice; prune again with --remove 2" in " ".join(
        finished.stderr.split()
    )
    assert (
        gradmap(
            *of_larger, "--remove", 3, "--compensator", "none", "--out", tmp_path / "same"
        ).returncode
        == 0
    )


@pytest.mark.parametrize(("name", "count"), [("gradient", 3), ("block-influence", 3), ("sleb", 1)])
def test_autocast_removes_the_layers_of_smollm2_that_float32_does(smollm2, name, count):
    calibration = build_calibration(
        load_tokenizer(smollm2.directory), BOOLQ, samples=8, tokens=64, seed=42
    )
    orders = []
    for dtype in ("float32", "autocast"):
        model = load_model(smollm2, dtype)
        with computing_in(dtype, model):
            subject = Subject(LayeredModel.of(model), calibration)
            orders.append(choose(name, subject, count).removal_order)
    assert orders[0] == orders[1]
