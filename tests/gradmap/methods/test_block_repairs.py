"""A removed block is made up for by one matrix: folded into the map before it (ReplaceMe), or on
the hidden state (Ghosted Layers)."""

import json
from dataclasses import replace

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.methods import replace_me
from gradmap.methods.compensation import run_and_capture
from gradmap.methods.replace_me import mean_turn, replacement_reference, train_direction
from gradmap.model.corrections import HIDDEN_STATE, Place, fold_changes, linear_output
from gradmap.pruning.plan import load_changes, load_plan
from tests.command_line import gradmap
from tests.conftest import CORRECTABLE, inside, perplexity_of_plan
from tests.gradmap.named_methods import repair
from tests.gradmap.pruning.test_prune import prune_arguments
from tests.gradmap.removals import attention, ffn, pairs
from tests.gradmap.repairs import prune, states_behind

BLOCK = pairs(2, 3)
REPLACING = ("replace-me", "replace-me-cosine")


def replacing_by_hand(model, ids, before, last):
    """a1 and a2 of the paper, (n, d) both: what the map before the block adds, and that and what
    the block adds."""
    output_map = model.map_at(model.output_of(before))
    ((_, output),) = run_and_capture(model, [output_map], ids)
    states = states_behind(model, ids)
    added = linear_output(output_map, output).reshape(states[last].shape)
    wanted = states[last] + added - states[before]
    return added.flatten(end_dim=-2), wanted.flatten(end_dim=-2)


def rounding(features):
    """Of a solution with normal equations in float64, whose condition is the square of theirs."""
    return 1e-14 * torch.linalg.cond(features).item() ** 2


@pytest.mark.parametrize("family", CORRECTABLE)
def test_a_block_is_replaced_by_the_papers_matrix(picos, input_ids, family):
    pruned = replace(prune(picos[family], input_ids, removed=BLOCK), accept_all=True)
    model, ids = pruned.model, pruned.calibration.fit_ids
    (correction,) = repair("replace-me", pruned).corrections
    assert correction.place == model.output_of(ffn(1))
    added, wanted = replacing_by_hand(model, ids, ffn(1), ffn(3))
    expected = replacement_reference(added, wanted)
    close = {"rtol": 0, "atol": rounding(added) * expected.abs().max().item()}
    torch.testing.assert_close(inside(correction).matrix, expected, **close)
    behind = states_behind(model, ids)[ffn(1)].flatten(end_dim=-2) - added + added @ expected.mT
    given = states_behind(model, ids, BLOCK, {correction.place: (correction.change,)})[ffn(1)]
    torch.testing.assert_close(given.flatten(end_dim=-2), behind, **close)


def test_what_is_folded_is_the_papers_product(picos, input_ids):
    """W_down <- T^T W_down."""
    pruned = prune(picos["llama"], input_ids, removed=BLOCK)
    (correction,) = repair("replace-me", pruned).corrections
    weight = pruned.model.down_projection(1).weight
    folded = fold_changes(weight, [correction.change], transposed=False)
    torch.testing.assert_close(folded, inside(correction).matrix @ weight)


def test_a_block_of_one_known_map_is_found():
    """By hand: with a1 the identity, T is a2."""
    wanted = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    assert torch.equal(replacement_reference(torch.eye(2).double(), wanted), wanted.mT)


@pytest.mark.parametrize("name", REPLACING)
def test_a_block_of_pairs_is_replaced_in_the_attention_before_it(picos, input_ids, name):
    removed = pairs("M1+A2", "M2+A3")
    pruned = replace(prune(picos["llama"], input_ids, removed=removed), accept_all=True)
    (correction,) = repair(name, pruned).corrections
    assert correction.place == pruned.model.output_of(attention(1))
    ids = pruned.calibration.fit_ids
    added, wanted = replacing_by_hand(pruned.model, ids, attention(1), attention(3))
    matrix = inside(correction).matrix
    if name == "replace-me":
        close = {"rtol": 0, "atol": rounding(added) * matrix.abs().max().item()}
        torch.testing.assert_close(matrix, replacement_reference(added, wanted), **close)
    else:
        assert mean_turn(added @ matrix.mT, wanted) < mean_turn(added, wanted)


def test_the_turn_is_one_minus_the_cosine():
    given = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    wanted = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert mean_turn(given, wanted).item() == pytest.approx((0 + 1 + 2) / 3)


def test_the_direction_is_trained_as_adam_was_published(monkeypatch):
    """Kingma and Ba's algorithm 1, written out."""
    monkeypatch.setattr(replace_me, "BATCH_TOKENS", 4)
    monkeypatch.setattr(replace_me, "EPOCHS", 3)
    generator = torch.Generator().manual_seed(0)
    added, wanted = (torch.randn(6, 3, generator=generator).double() for _ in range(2))
    drawn = torch.Generator().manual_seed(5)
    orders = [torch.randperm(6, generator=drawn) for _ in range(3)]
    batches = [batch for order in orders for batch in (order[:4], order[4:])]
    matrix, first, second = torch.eye(3).double(), torch.zeros(3, 3), torch.zeros(3, 3)
    for step, batch in enumerate(batches, start=1):
        matrix.requires_grad_(True)
        loss = mean_turn(added[batch] @ matrix.mT, wanted[batch])
        (gradient,) = torch.autograd.grad(loss, matrix)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        ratio = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        matrix = matrix.detach() - 1e-4 * ratio
    torch.testing.assert_close(train_direction(added, wanted, 5), matrix, rtol=0, atol=1e-12)


def test_the_direction_is_trained_in_float32_where_products_are_of_bfloat16():
    generator = torch.Generator().manual_seed(0)
    added, wanted = (torch.randn(50, 8, generator=generator) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = train_direction(added, wanted, 5)
    assert torch.equal(under_autocast, train_direction(added, wanted, 5))


@pytest.mark.parametrize("name", REPLACING)
@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ((1, 3), "replaces one block of consecutive layers, and the removed ones are 2 blocks"),
        ((0, 1), "the first layer is removed; give --protect-first 1"),
        ((0, 3), "the first layer is removed; give --protect-first 1"),
    ],
)
def test_what_is_no_block_behind_a_layer_is_not_replaced(picos, input_ids, name, removed, message):
    with pytest.raises(UserError, match=message):
        repair(name, prune(picos["llama"], input_ids, removed=pairs(*removed)))


@pytest.mark.parametrize(("tokens", "bos", "enough"), [(8, None, True), (8, 1, False)])
def test_fewer_tokens_than_inputs_are_refused(picos, input_ids, tokens, bos, enough):
    """Four samples of 8 tokens are the 32 that the hidden state is wide; not if all begin with
    BOS."""
    pruned = prune(picos["llama"], input_ids[:4, :tokens], removed=BLOCK)
    pruned = replace(pruned, calibration=replace(pruned.calibration, bos=bos))
    if enough:
        repair("replace-me", pruned)
        return
    with pytest.raises(UserError, match="32 inputs without regularisation, on 29 different tokens"):
        repair("replace-me", pruned)


def test_hidden_states_before_cuts_are_mapped_by_the_papers_matrix(pico, input_ids):
    """Each behind those before it."""
    removed = pairs(1, 3)
    pruned = replace(prune(pico, input_ids, removed=removed), accept_all=True)
    model, ids = pruned.model, pruned.calibration.fit_ids
    wanted = states_behind(model, ids)
    changes: dict = {}
    for (layer, last), correction in zip(
        [(0, 1), (2, 3)], repair("ghosted", pruned).corrections, strict=True
    ):
        assert correction.place == Place(layer, HIDDEN_STATE)
        given = states_behind(model, ids, removed, changes)[ffn(layer)].flatten(end_dim=-2)
        missing = wanted[ffn(last)].flatten(end_dim=-2) - given
        eye = torch.eye(given.shape[1]).double()
        expected = eye + torch.linalg.solve(given.mT @ given + 1e-6 * eye, given.mT @ missing)
        close = {"rtol": 0, "atol": rounding(given) * expected.abs().max().item()}
        torch.testing.assert_close(inside(correction).matrix.mT, expected, **close)
        changes[correction.place] = (correction.change,)


def test_a_mapped_hidden_state_is_evaluated_and_not_exported(picos, word_file, tmp_path):
    pico, plan = picos["llama"], tmp_path / "plan"
    chosen = ("--selector", "window", "--compensator", "ghosted", "--accept", "always")
    finished = gradmap(*prune_arguments(pico, word_file, plan), *chosen)
    assert finished.returncode == 0, finished.stderr
    assert [place.target for place in load_changes(plan, load_plan(plan))] == [HIDDEN_STATE]
    words = [3 + (7 * index) % 190 for index in range(400)]
    (tmp_path / "other.txt").write_text(" ".join(f"w{word}" for word in words))
    text = ("--perplexity", f"own=file:{tmp_path}/other.txt", "--segment", 16, "--dtype", "float64")
    of_plan = ("--model", pico.directory, "--plan", plan)
    finished = gradmap("eval", *of_plan, *text, "--out", tmp_path / "eval.json")
    assert finished.returncode == 0, finished.stderr
    measured = json.loads((tmp_path / "eval.json").read_text())["pruned"]["perplexity"]["own"]
    expected = perplexity_of_plan(pico, plan, torch.tensor(words).reshape(25, 16))
    assert measured["value"] == pytest.approx(expected, rel=1e-6)
    finished = gradmap("export", *of_plan, "--format", "hf", "--out", tmp_path / "out")
    assert finished.returncode == 2
    assert "--compensator linear-patch or ghosted" in " ".join(finished.stderr.split())


@pytest.mark.parametrize("name", [*REPLACING, "ghosted"])
def test_a_streamed_model_is_repaired_the_same(picos, word_file, tmp_path, name):
    changes = []
    for number, how in enumerate([(), ("--stream",)]):
        plan = tmp_path / str(number)
        chosen = ("--selector", "last", "--compensator", name, "--accept", "always", *how)
        finished = gradmap(*prune_arguments(picos["llama"], word_file, plan), *chosen)
        assert finished.returncode == 0, finished.stderr
        changes.append(load_changes(plan, load_plan(plan)))
    for (place, (one,)), (other, (streamed,)) in zip(*(it.items() for it in changes), strict=True):
        assert place == other
        # as they are stored
        torch.testing.assert_close(one.matrix, streamed.matrix, rtol=1e-5, atol=1e-6)
