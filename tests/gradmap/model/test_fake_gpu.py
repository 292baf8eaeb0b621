"""The fake GPU catches what it is there for, and computes what the CPU computes."""

import pytest
import torch
from torch import nn

from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import losses_from, run_layers
from tests.gradmap.fake_gpu import GPU, fake_gpu

VALUES = torch.arange(6.0).reshape(2, 3)


def net(layers=3):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers))).requires_grad_(False)


@pytest.mark.parametrize("move", ["itself", "by the harness"])
def test_its_numbers_are_those_of_the_cpu(move):
    expected, gradients = net()(VALUES), {}
    with fake_gpu() as gpu:
        model = net().to("cuda") if move == "itself" else gpu.move(net())
        inputs = VALUES.cuda().requires_grad_()
        output = model(inputs)
        assert (output.device, output.device.type, output.is_cuda) == (GPU, "cuda", True)
        torch.nn.functional.gelu(output).sum().backward()
        inputs.grad[:, 0] = 7  # a view that is changed in place
        gradients["cuda"] = inputs.grad.cpu()
        torch.testing.assert_close(output.detach().cpu(), expected, rtol=0, atol=0)
    inputs = VALUES.clone().requires_grad_()
    torch.nn.functional.gelu(net()(inputs)).sum().backward()
    torch.testing.assert_close(gradients["cuda"][:, 1:], inputs.grad[:, 1:], rtol=0, atol=0)
    assert gradients["cuda"][:, 0].tolist() == [7, 7]


def test_a_model_of_transformers_computes_the_same(pico, input_ids):
    model = pico.load()
    expected = losses_from(
        LayeredModel.of(model), run_layers(LayeredModel.of(model), input_ids), input_ids
    )
    with fake_gpu() as gpu:
        count = len(list(model.parameters()))  # weights that are tied count once
        assert len(list(gpu.move(model).parameters())) == count
        ids = input_ids.to(model.device)
        actual = losses_from(
            LayeredModel.of(model), run_layers(LayeredModel.of(model), ids), ids
        ).cpu()
    # a router takes its softmax in float32, and attention may be summed up in another order
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


MIXED = {
    "a sum": lambda tensor: tensor + VALUES,
    "a product": lambda tensor: VALUES @ tensor.mT,
    "a number of the GPU": lambda tensor: VALUES * tensor[0, 0],
    "a linear map": lambda tensor: net()(tensor),
    "joined": lambda tensor: torch.cat([tensor, VALUES]),
    "made where nobody said": lambda tensor: tensor * torch.ones(3),
    "taken out by the GPU's indices": lambda tensor: VALUES[tensor.long()[0]],
}


@pytest.mark.parametrize("kind", MIXED)
def test_an_operand_that_is_left_on_the_cpu_is_refused(kind):
    with fake_gpu(), pytest.raises(RuntimeError, match="is on the CPU, others on cuda:0"):
        MIXED[kind](VALUES.to("cuda"))


def test_numbers_may_be_on_the_cpu():
    with fake_gpu() as gpu:
        tensor = VALUES.to(GPU)
        with gpu.traffic() as traffic:
            result = torch.where(tensor > torch.tensor(2.0), tensor * torch.tensor(2.0), 1.0) + 1
            result[0] = torch.tensor(5.0)
        assert (traffic.copies, traffic.waits) == (0, 0)
        assert result.tolist() == [[5, 5, 5], [7, 9, 11]]


WAITS = {
    "item": lambda tensor: tensor.sum().item(),
    "any in an if": lambda tensor: 1 if tensor.any() else 0,
    "int": lambda tensor: range(int(tensor[0, 1])),
    "float": lambda tensor: float(tensor.mean()),
    "nonzero": lambda tensor: tensor.nonzero(),
    "a mask": lambda tensor: tensor[tensor > 2],
    "assigned by a mask": lambda tensor: tensor.clone().__setitem__(tensor > 2, 0.0),
    "unique": lambda tensor: tensor.unique(),
    "equal": lambda tensor: torch.equal(tensor, tensor + 1),
    "solving": lambda tensor: torch.linalg.cholesky(
        tensor.mT @ tensor + torch.eye(3, device=tensor.device)
    ),
}


@pytest.mark.parametrize("kind", WAITS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_wait_is_counted_where_it_happens(kind, inference):
    with fake_gpu() as gpu, torch.inference_mode(inference):
        tensor = VALUES.to(GPU)
        with gpu.traffic() as traffic:
            WAITS[kind](tensor)
    assert (traffic.copies, traffic.waits, traffic.waits_in_backward) == (0, 1, 0)
    assert "test_fake_gpu.py:" in str(traffic)


COPIES = {
    "to": (lambda tensor: VALUES.to(tensor.device), 24),
    "to another tensor": (lambda tensor: VALUES.to(tensor), 24),
    "in another dtype": (lambda tensor: VALUES.to(tensor.device, torch.float64), 24),
    "cuda": (lambda tensor: VALUES.cuda(), 24),
    "cpu": (lambda tensor: tensor.cpu(), 24),
    "tolist": (lambda tensor: tensor.tolist(), 24),
    "made of a list": (lambda tensor: torch.tensor([1, 2], device=tensor.device), 16),
    "into the GPU's": (lambda tensor: tensor.clone().copy_(VALUES), 24),
    "into the CPU's": (lambda tensor: VALUES.clone().copy_(tensor), 24),
    "a slice of the CPU's": (lambda tensor: VALUES.clone().__setitem__(slice(1), tensor[:1]), 12),
    "indices of the CPU": (lambda tensor: tensor[torch.tensor([1, 0])], 16),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_counted_and_waits(kind):
    copy, size_bytes = COPIES[kind]
    with fake_gpu() as gpu:
        tensor = VALUES.to(GPU)
        with gpu.traffic() as traffic:
            copy(tensor)
    assert (traffic.copies, traffic.copied_bytes, traffic.waits) == (1, size_bytes, 1)


def test_what_stays_on_the_gpu_is_free():
    with fake_gpu() as gpu:
        tensor = VALUES.to(GPU)
        with gpu.traffic() as traffic:
            generator = torch.Generator(tensor.device).manual_seed(0)
            drawn = torch.multinomial(tensor + 1, 1, generator=generator)
            made = torch.zeros(2, 3, device=tensor.device) + torch.arange(3, device="cuda")
            made[:, 1:].copy_(tensor[:, 1:].to(GPU).double())
            joined = torch.cat([made, tensor.new_ones(2, 3), torch.ones_like(tensor)])[drawn[:, 0]]
            torch.tensor([], device=GPU)
        assert joined.device == GPU
        assert (traffic.copies, traffic.waits) == (0, 0)


def test_an_upload_that_does_not_block_does_not_wait():
    with fake_gpu() as gpu, gpu.traffic() as traffic:
        VALUES.to(GPU, non_blocking=True)
    assert (traffic.copies, traffic.waits) == (1, 0)


DOWNLOADS = {
    "copy_": lambda tensor: torch.empty(2, 3, pin_memory=True).copy_(tensor, non_blocking=True),
    "to": lambda tensor: tensor.to("cpu", non_blocking=True),
}


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_what_is_still_on_the_way_to_the_cpu_cannot_be_read_there(kind):
    with fake_gpu() as gpu:
        tensor = VALUES.to(GPU)
        with gpu.traffic() as traffic:
            sent = DOWNLOADS[kind](tensor)
            back = sent[:1].to(GPU, non_blocking=True)  # the GPU does one after the other
            with pytest.raises(RuntimeError, match="still on the way to the CPU"):
                torch.cat([sent, sent])
        assert (traffic.copies, traffic.waits) == (2, 0)
        assert back.tolist() == VALUES[:1].tolist()  # waits
        assert torch.cat([sent, sent]).tolist() == 2 * VALUES.tolist()


def test_a_wait_in_a_backward_pass_is_told_from_others():
    """A hook that reads a value, as a norm's once did."""
    with fake_gpu() as gpu:
        inputs = VALUES.to(GPU).requires_grad_()
        output = gpu.move(net())(inputs)
        output.register_hook(lambda gradient: None if gradient.any() else gradient)
        with gpu.traffic() as traffic:
            output.sum().item()
            output.sum().backward()
    assert (traffic.waits, traffic.waits_in_backward) == (2, 1)


def test_a_copy_for_every_layer_grows_with_the_layers():
    """A hook whose matrix stays on the CPU, as those of a plan once did."""
    counts, matrix = {}, torch.eye(3)
    for layers in (3, 6):
        with fake_gpu() as gpu:
            model = gpu.move(net(layers))
            for layer in model.children():
                layer.register_forward_hook(lambda module, args, output: output @ matrix.to(output))
            with gpu.traffic() as traffic:
                model(VALUES.to(GPU))
        counts[layers] = traffic.copies
    assert counts == {3: 1 + 3, 6: 1 + 6}


def test_the_gpu_is_gone_after_the_block():
    with fake_gpu():
        tensor = VALUES.to(GPU)
    with pytest.raises(AssertionError, match="outside of the block"):
        tensor + 1
    with pytest.raises((AssertionError, RuntimeError)):
        VALUES.to(torch.device("cuda", 99))  # nowhere, with or without a real one
    assert torch.Generator().device.type == "cpu"
