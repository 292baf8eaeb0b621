"""What goes between host and GPU does not grow with what is computed: copies and waits of every
step are counted.

A wait is the host's for the GPU: a blocking copy, or a value or size that is read. Where a GPU is
fast, each costs more than a layer does, since nothing is given to it meanwhile. The steps and their
counts are in tests/gradmap/gpu_steps.py.
"""

from unittest.mock import patch

import pytest
import torch

from gradmap.methods import writing
from gradmap.methods.compensation import Compensation, Correction
from gradmap.methods.distil import train_low_rank, written_by_dense
from gradmap.methods.distillation import Lessons
from gradmap.methods.writing import write_on
from tests.families import LAYERS
from tests.gradmap.gpu_steps import (
    MAPS,
    SIZES,
    STEPS,
    Allowed,
    Size,
    evaluation_of_choices,
    growth,
    importance,
    plan_changes,
    pruned,
    repair_round,
    repair_round_after_a_removal,
    run_on_gpu,
)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_no_more_copies_and_waits_than_these(llamas, name, size):
    prepare, allowed = STEPS[name]
    _, traffic = run_on_gpu(llamas[size.layers], prepare, size)
    copies, waits = allowed.of(size)
    assert traffic.copies <= copies, traffic
    assert traffic.waits <= waits, traffic
    assert traffic.waits_in_backward == 0, traffic


@pytest.mark.parametrize("name", STEPS)
def test_a_step_computes_what_it_computes_on_a_cpu(llamas, name):
    prepare, _ = STEPS[name]
    actual, _ = run_on_gpu(llamas[4], prepare, Size())
    expected = prepare(llamas[4], llamas[4].load(), Size())()
    # float64 but for the losses, and attention is summed up in another order
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)


def test_the_mask_that_choices_need_is_made_on_the_gpu(llamas):
    """Bytes that are copied grow with the tokens, not with their square."""
    sizes = [Size(tokens=tokens) for tokens in (8, 40)]
    few, many = (
        run_on_gpu(llamas[4], evaluation_of_choices, size)[1].copied_bytes for size in sizes
    )
    assert many <= 5 * few


def test_importance_of_every_family(pico):
    """Experts are run one by one, so the host has to know how many tokens each was given, once in a
    layer."""
    size = Size(layers=LAYERS)
    actual, traffic = run_on_gpu(pico, importance, size)
    allowed = Allowed(
        batch=(2, 7), layer_batch=(1, 1) if pico.architecture.expert_down_projections else (0, 0)
    )
    copies, waits = allowed.of(size)
    assert traffic.copies <= copies, traffic
    assert traffic.waits <= waits, traffic
    assert traffic.waits_in_backward == 0, traffic
    torch.testing.assert_close(actual, importance(pico, pico.load(), size)(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("prepare", [repair_round, repair_round_after_a_removal])
def test_states_that_have_no_room_on_the_gpu_are_sent_to_the_cpu_without_a_wait(
    llamas, prepare, monkeypatch
):
    size = Size(layers=8)
    scores, with_room = run_on_gpu(llamas[8], prepare, size)
    monkeypatch.setattr("gradmap.model.batching.GPU_STATES_SHARE", 0)
    scores_without, without_room = run_on_gpu(llamas[8], prepare, size)
    assert without_room.copies > 2 * with_room.copies
    # states without a removed layer are the CPU's work
    assert without_room.waits <= with_room.waits + 2, without_room
    assert scores_without == pytest.approx(scores, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("free_bytes", "batches"), [(1 << 30, [10]), (9 * 40 * 2**10, [4, 4, 2])])
def test_a_gpu_writes_as_many_texts_at_once_as_have_room(llamas, monkeypatch, free_bytes, batches):
    """And what a CPU writes in batches of its own. A token's keys and values of 2 x 8 float64 in 4
    layers are 1 KiB."""
    size, prompts = Size(samples=5, tokens=40), []
    monkeypatch.setattr(writing, "WRITTEN_TOGETHER", 3)
    expected = written_by_dense(pruned(llamas[4], llamas[4].load(), size))

    def recorded(model, some, numbers):
        prompts.append(len(some))
        return write_on(model, some, numbers)

    def prepare(pico, model, size):
        def run():
            with patch("torch.cuda.mem_get_info", lambda device: (free_bytes, free_bytes)):
                return written_by_dense(pruned(pico, model, size))

        return run

    monkeypatch.setattr(writing, "write_on", recorded)
    actual, _ = run_on_gpu(llamas[4], prepare, size)
    assert prompts == batches
    assert torch.equal(actual, expected)


def training(pico, model, size, changes):
    so_far = Compensation(
        tuple(
            Correction(place, change, 2.0, 1.0, accepted=True)
            for place, (change,) in changes.items()
        )
    )
    to_repair = pruned(pico, model, size)

    def train():
        ids = torch.cat([size.input_ids, written_by_dense(to_repair).to(size.input_ids.device)])
        goal = to_repair.walk(to_repair.sublayers, ids).finish({})
        return train_low_rank(to_repair, so_far, Lessons(ids, goal))

    return train


def bare_training(pico, model, size):
    return training(pico, model, size, {})


def training_of_a_plan(pico, model, size):
    return training(pico, model, size, plan_changes(pico, model))


# Factors are drawn on the CPU; the corrections of a plan are moved to train on top of them, and to
# judge.
@pytest.mark.parametrize(
    ("prepare", "moves_of_a_map"), [(bare_training, 1), (training_of_a_plan, 3)]
)
def test_a_step_of_training_takes_the_same_however_deep_the_model(llamas, prepare, moves_of_a_map):
    """Four samples more are twelve with what is written: three steps."""
    counts = {}
    for layers in (4, 8):
        for samples in (4, 8):
            _, traffic = run_on_gpu(llamas[layers], prepare, Size(layers, samples, batch=4))
            assert traffic.waits_in_backward == 0, traffic
            counts[layers, samples] = traffic.copies, traffic.waits

    copies, waits = growth(counts, (8, 4), (8, 8))
    assert (copies, waits) == growth(counts, (4, 4), (4, 8))
    assert copies == 0
    assert waits <= 3 * 3
    assert max(growth(counts, (4, 4), (8, 4))) <= 4 * MAPS * moves_of_a_map
