"""What `distil` trains on, and what training and writing do."""

import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from gradmap.methods.compensation import Compensation
from gradmap.methods.distil import train_low_rank, written_by_dense
from gradmap.methods.distillation import Lessons, distillation_gradients
from gradmap.methods.sequential import refit_around_runs
from gradmap.methods.writing import (
    PROMPT_TOKENS,
    draw_prompts,
    draw_tokens,
    uniform_numbers,
    write_on,
)
from gradmap.model.batching import LOGITS_BYTES
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import logits_from, run_layers, sample_divergences
from tests.conftest import BOS, inside
from tests.gradmap.repairs import REMOVED, prune

distilling = import_module("gradmap.methods.distil")  # the package has a function of that name


@pytest.mark.parametrize("positions", [1000, 3])
def test_distillation_gradients_are_those_of_the_divergence_of_two_models(
    picos, input_ids, monkeypatch, positions
):
    """Also where not even the logits of one sample go through at once."""
    vocabulary = picos["llama"].load().config.vocab_size
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * positions * vocabulary)
    pruned = prune(picos["llama"], input_ids)
    model = pruned.model
    goal = pruned.walk(pruned.sublayers, input_ids).finish({})
    hidden = (
        goal + 0.1 * torch.randn(goal.shape, generator=torch.Generator().manual_seed(1))
    ).requires_grad_(True)
    wanted = model.network(input_ids=input_ids).logits.float()
    divergences = sample_divergences(logits_from(model, hidden, input_ids).float(), wanted)
    (divergences.sum() / input_ids.numel()).backward()
    actual = distillation_gradients(model, hidden.detach(), goal, input_ids)
    # the loss is computed in float32
    torch.testing.assert_close(actual.gradients, hidden.grad, rtol=1e-4, atol=1e-8)
    # and the divergence is a difference of sums of about log(vocabulary) for each position
    rounding = torch.finfo(torch.float32).eps * input_ids.numel() * math.log(vocabulary)
    torch.testing.assert_close(actual.divergence, divergences.sum(), rtol=0, atol=rounding)


def test_the_dense_model_writes_what_it_would_without_a_cache(pico, input_ids):
    model, ids = pico.load(), input_ids[:, :4]
    numbers = uniform_numbers(len(ids), input_ids.shape[1] - ids.shape[1], seed=3)
    written = write_on(LayeredModel.of(model), ids, numbers)
    for number in numbers.split(1, dim=1):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, draw_tokens(logits, number)], dim=1)
    assert torch.equal(written, ids)


def lessons_of(pruned):
    ids = torch.cat([pruned.calibration.fit_ids, written_by_dense(pruned)])
    return Lessons(ids, pruned.walk(pruned.sublayers, ids).finish({}))


def test_training_sees_every_sample_and_all_that_the_dense_model_wrote_once(
    picos, input_ids, monkeypatch
):
    pruned = prune(picos["llama"], input_ids)
    seen = []
    set_gradients = distilling.set_lesson_gradients
    monkeypatch.setattr(
        distilling,
        "set_lesson_gradients",
        lambda model, step, *rest: (seen.append(step.input_ids), set_gradients(model, step, *rest)),
    )
    distilling.distil(pruned)
    expected = torch.cat([pruned.calibration.fit_ids, written_by_dense(pruned)])
    assert sorted(torch.cat(seen).tolist()) == sorted(expected.tolist())


def test_training_goes_on_with_fewer_samples_at_once_where_memory_runs_out(
    picos, input_ids, monkeypatch, capsys
):
    pruned = prune(picos["llama"], input_ids)
    lessons = lessons_of(pruned)
    expected = train_low_rank(pruned, Compensation(), lessons)

    def short_of_memory(model, ids, recompute):
        if len(ids) > 1:
            raise torch.OutOfMemoryError
        return run_layers(model, ids, recompute)

    monkeypatch.setattr("gradmap.methods.distillation.run_layers", short_of_memory)
    actual = train_low_rank(pruned, Compensation(), lessons)
    assert "going on with 1 samples at once" in capsys.readouterr().err
    for one, other in zip(actual, expected, strict=True):
        # gradients are sums in another order: of losses in float32. Adam's steps follow their sign
        # where they are small
        torch.testing.assert_close(inside(one).up, inside(other).up, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tokens_per_input", [0, 8])
def test_what_the_dense_model_writes_is_fitted_on_and_is_more_where_tokens_are_few(
    picos, input_ids, monkeypatch, tokens_per_input
):
    pico = picos["llama"]
    monkeypatch.setattr(distilling, "TOKENS_PER_INPUT", tokens_per_input)
    pruned = replace(prune(pico, input_ids), accept_all=True)
    known, held_out = pruned.calibration.fit_ids, pruned.calibration.held_out_ids
    inputs = pico.load().config.intermediate_size
    lacking = max(0, math.ceil(tokens_per_input * inputs / known.shape[1]) - len(known))
    assert (lacking > 2 * len(known)) == (tokens_per_input > 0)
    written = written_by_dense(pruned)
    assert len(written) == max(2 * len(known), lacking)
    together = torch.cat([known, written, held_out])
    calibration = replace(pruned.calibration, input_ids=together, held_out=len(held_out))
    expected = refit_around_runs(replace(pruned, calibration=calibration)).corrections
    actual = distilling.distil(pruned).corrections[: len(expected)]
    for one, other in zip(actual, expected, strict=True):
        assert one.place == other.place
        torch.testing.assert_close(inside(one).matrix, inside(other).matrix, rtol=1e-9, atol=1e-12)


def test_tokens_are_drawn_from_the_whole_distribution():
    draws, chances = 20000, torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    tokens = draw_tokens(chances.log().expand(draws, -1), uniform_numbers(draws, 1, seed=5))
    assert tokens.shape == (draws, 1)
    shares = tokens[:, 0].bincount(minlength=len(chances)) / draws
    deviations = (chances * (1 - chances) / draws).sqrt()
    # and never the one that has no chance
    assert ((shares - chances).abs() <= 4 * deviations).all(), shares


def test_tokens_do_not_depend_on_how_large_all_logits_are():
    numbers = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)[:, None]
    logits = torch.arange(4.0).expand(len(numbers), -1)
    tokens = draw_tokens(logits, numbers)
    assert len(tokens.unique()) > 1
    for further in (-1024, 1024):  # whose exponentials are beyond float64; sums with it are exact
        assert torch.equal(draw_tokens(logits + further, numbers), tokens)


def test_prompts_come_from_every_place_of_every_sample(input_ids):
    places = {
        tuple(run.tolist()) for sample in input_ids for run in sample.unfold(0, PROMPT_TOKENS, 1)
    }
    # of 45 places: one is missed with a chance of 1e-18
    drawn = draw_prompts(input_ids, None, 2000, seed=0)
    assert {tuple(prompt) for prompt in drawn.tolist()} == places


def test_what_the_dense_model_writes_begins_with_samples_that_may_be_fitted_on(picos, input_ids):
    pruned = prune(picos["llama"], input_ids)
    known = {
        tuple(run.tolist())
        for sample in pruned.calibration.fit_ids
        for run in sample.unfold(0, PROMPT_TOKENS, 1)
    }
    written = written_by_dense(pruned)
    assert written.shape[1] == input_ids.shape[1]
    assert {tuple(sample[:PROMPT_TOKENS].tolist()) for sample in written} <= known
    assert len(written.unique(dim=0)) == len(written)


def test_what_the_dense_model_writes_begins_with_bos_where_samples_do(picos, input_ids):
    pruned = prune(picos["llama"], torch.cat([torch.full((5, 1), BOS), input_ids], dim=1))
    pruned = replace(pruned, calibration=replace(pruned.calibration, bos=BOS))
    known = {
        tuple(run.tolist()) for sample in input_ids for run in sample.unfold(0, PROMPT_TOKENS, 1)
    }
    written = written_by_dense(pruned)
    assert written.shape[1] == input_ids.shape[1] + 1
    assert set(written[:, 0].tolist()) == {BOS}
    prompts = {tuple(sample[1 : 1 + PROMPT_TOKENS].tolist()) for sample in written}
    assert prompts <= known  # which have no BOS
    assert len(prompts) > 1


def test_training_every_linear_map_that_is_left_brings_the_dense_predictions_closer(
    pico, input_ids
):
    pruned = prune(pico, input_ids)
    model = pruned.model
    maps = dict(model.linear_maps(pruned.kept))
    assert {place.layer for place in maps} == {0, 2, 4}
    corrections = train_low_rank(pruned, Compensation(), lessons_of(pruned))
    assert {one.place for one in corrections if inside(one).up.any()} == set(maps)
    wanted = model.network(input_ids=input_ids).logits.softmax(-1)
    distances = []
    for changes in ({}, {one.place: (one.change,) for one in corrections}):
        with model.changed(changes, without=REMOVED):
            distances.append(
                -(wanted * model.network(input_ids=input_ids).logits.log_softmax(-1)).sum(-1).mean()
            )
    assert distances[1] < distances[0]
