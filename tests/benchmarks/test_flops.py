"""The counter that arithmetic and benchmarks are held against."""

import pytest
import torch
from torch import nn

from benchmarks.flops import counted

SAMPLES, TOKENS, IN, OUT = 2, 3, 5, 7
PRODUCT = 2 * SAMPLES * TOKENS * IN * OUT


def linear_pass(bias, backward):
    layer = nn.Linear(IN, OUT, bias=bias)
    entering = torch.ones(SAMPLES, TOKENS, IN, requires_grad=backward)
    leaving = layer(entering)
    if backward:
        leaving.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_multiplies_once_forward_and_twice_backward(bias):
    assert counted(lambda: linear_pass(bias, backward=False)) == PRODUCT
    assert counted(lambda: linear_pass(bias, backward=True)) == 3 * PRODUCT


@pytest.mark.parametrize("hidden_from_autograd", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [True, False])
def test_what_hides_from_autograd_is_counted(hidden_from_autograd, bias):
    with hidden_from_autograd():
        assert counted(lambda: linear_pass(bias, backward=False)) == PRODUCT
        assert (
            counted(lambda: torch.ones(4, IN, OUT) @ torch.ones(OUT, IN)) == 2 * 4 * IN * OUT * IN
        )
        assert (
            counted(lambda: torch.einsum("bij,bjk->bik", torch.ones(2, 3, 4), torch.ones(2, 4, 5)))
            == 240
        )


def test_products_in_another_dtype_are_as_many():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert counted(lambda: linear_pass(bias=True, backward=False)) == PRODUCT


def test_only_products_are_counted():
    assert counted(lambda: (torch.ones(8, 8) * 2).softmax(dim=-1).sum()) == 0
