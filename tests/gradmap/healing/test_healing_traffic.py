"""A GPU is never waited for in a step of healing but where transformers does."""

from functools import partial

import pytest
import torch

from gradmap.healing.heal import student_of
from gradmap.healing.options import HealOptions
from gradmap.healing.trainer import Trainer
from tests.gradmap.gpu_steps import MAPS, Size, growth, plan_changes, pruned, run_on_gpu
from tests.gradmap.healing.known_samples import KnownSamples


def a_round(trained, pico, model, size):
    """Of as many steps as there are samples, with a plan's corrections."""
    options = HealOptions(
        text=["file:none.txt"],
        tokens=size.tokens,
        step_tokens=size.tokens,
        budget_tokens=size.samples * size.tokens,
        rank=2,
        train=trained,
    )
    changes, to_heal = plan_changes(pico, model), pruned(pico, model, size)
    student = student_of(to_heal, changes, options, torch.float32)
    trainer = Trainer(to_heal, student, KnownSamples(size.input_ids.cpu()), options)

    def train():
        trainer._round()
        return torch.tensor(trainer.progress.losses)

    return train


@pytest.mark.parametrize("trained", ["low-rank", "full"])
def test_a_step_of_healing_takes_the_same_however_deep_the_model(llamas, trained):
    counts, prepare = {}, partial(a_round, trained)
    for layers in (4, 8):
        for steps in (2, 6):
            losses, traffic = run_on_gpu(llamas[layers], prepare, Size(layers, steps, batch=1))
            assert len(losses) == steps
            assert traffic.waits_in_backward == 0, traffic
            counts[layers, steps] = traffic.copies, traffic.waits

    copies, waits = growth(counts, (8, 2), (8, 6))
    assert (copies, waits) == growth(counts, (4, 2), (4, 6))
    assert copies == 0
    # transformers looks at positions: in the dense model, in the pruned one, and for logits of both
    assert waits <= 4 * 4
    # corrections of a plan are moved once in a round
    assert max(growth(counts, (4, 2), (8, 2))) <= 4 * MAPS


@pytest.mark.parametrize("trained", ["low-rank", "full"])
def test_a_gpu_computes_what_a_cpu_does(llamas, trained):
    prepare = partial(a_round, trained)
    actual, _ = run_on_gpu(llamas[4], prepare, Size())
    expected = prepare(llamas[4], llamas[4].load(), Size())()
    # losses are computed in float32
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-7)
