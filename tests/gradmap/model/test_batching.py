"""Batches follow memory, and results do not follow batches."""

import pytest
import torch
from torch import nn

from gradmap.common.errors import UserError
from gradmap.methods.gradmap.scores import (
    fitting_batches,
    gradient_scores,
    streamed_gradient_scores,
)
from gradmap.model.batching import (
    CPU_ACTIVATION_BYTES,
    LOGITS_BYTES,
    TOKENS,
    Batches,
    forward_batch,
    logits_batch,
    logits_parts,
    measured_batch_size,
)
from gradmap.model.layered import LayeredModel


def out_of_memory():
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")


def test_a_batch_that_does_not_fit_is_halved_and_every_sample_is_run_once():
    done: list = []

    def run(batch):
        if batch.stop - batch.start > 2:
            out_of_memory()
        done.extend(range(batch.start, batch.stop))

    batches = Batches(8)
    batches.run(7, run)
    assert done == list(range(7))
    assert batches.size == 2  # later rounds need not try again


def test_one_sample_that_does_not_fit_is_refused_with_a_cure():
    with pytest.raises(UserError, match="--stream"):
        Batches(4).run(3, lambda batch: out_of_memory())


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        Batches(4).run(3, lambda batch: (_ for _ in ()).throw(RuntimeError("shapes do not match")))


def test_the_batch_is_what_memory_holds_for_the_backward_pass():
    floats = CPU_ACTIVATION_BYTES // 4 // 10

    def run_one():  # keeps one tensor of a tenth of what is allowed
        values = torch.ones(floats, requires_grad=True)
        values.exp().sum().backward()

    assert measured_batch_size(run_one, 2, torch.device("cpu")) == 10
    assert measured_batch_size(lambda: None, 128, torch.device("cpu")) == TOKENS["cpu"] // 128
    assert measured_batch_size(lambda: None, 10**6, torch.device("cpu")) == 1


def test_logits_in_float32_of_a_batch_take_what_is_allowed(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 10 * torch.ones(16, 1000).nbytes)
    assert logits_batch(16, 1000, cpu) == 10
    assert logits_batch(17, 1000, cpu) == 9
    assert logits_batch(161, 1000, cpu) == 1  # at least a sample


def test_a_gpu_takes_more_at_once(monkeypatch):
    """A quarter of what is free for what is kept, and enough tokens to be busy where nothing is."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 10 * 400, 10**9))

    def keep_400_bytes():
        torch.ones(100, requires_grad=True).exp().sum().backward()

    assert measured_batch_size(keep_400_bytes, 2, gpu) == 10
    sizes = [
        [forward_batch(torch.zeros(9, tokens), device) for device in (cpu, gpu)]
        for tokens in (128, 2048)
    ]
    assert sizes == [[4, 16], [4, 4]]


def streamed_scores(model, input_ids, batches):
    return streamed_gradient_scores(model, input_ids, batches, [])


@pytest.mark.parametrize("score", [gradient_scores, streamed_scores])
def test_scores_do_not_depend_on_memory_running_out_midway(picos, input_ids, monkeypatch, score):
    """The second batch fails in its backward pass, when norms of some layers have been taken
    already."""
    from gradmap.methods.gradmap import scores as importance

    pico = picos["llama"]
    model = pico.load()
    expected = score(LayeredModel.of(model), input_ids, Batches(4))
    original, calls = importance.loss_gradients, []

    def fail_once(*args):
        calls.append(args)
        return out_of_memory() if len(calls) == 2 else original(*args)

    monkeypatch.setattr(importance, "loss_gradients", fail_once)
    batches = Batches(4)
    actual = score(LayeredModel.of(model), input_ids, batches)
    assert batches.size == 2
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_weights_do_not_count_however_large():
    model = nn.Linear(4096, 4096, bias=False).requires_grad_(False)
    values = torch.ones(1, 4096, requires_grad=True)
    size = measured_batch_size(lambda: model(values).exp().sum().backward(), 8, torch.device("cpu"))
    assert size == TOKENS["cpu"] // 8


def test_picos_go_in_batches_of_the_largest_size(picos, input_ids):
    pico = picos["llama"]
    for streamed in (False, True):
        size = fitting_batches(pico.layered(), input_ids, streamed).size
        assert size == TOKENS["cpu"] // input_ids.shape[1]


@pytest.mark.parametrize("logits", [1, 7, 20, 100, 10_000])
def test_every_position_goes_through_the_output_layer_once_with_few_enough_logits(
    monkeypatch, logits
):
    samples, tokens, vocabulary = 5, 20, 3
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * logits)
    seen = torch.zeros(samples, tokens)
    for part in logits_parts(samples, tokens, vocabulary, torch.device("cpu")):
        seen[part] += 1
        assert vocabulary * seen[part].numel() <= max(logits, vocabulary)
    assert (seen == 1).all()
