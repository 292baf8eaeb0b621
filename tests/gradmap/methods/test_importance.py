"""Eq. 7 by activations equals Eq. 7 as written."""

import pytest
import torch
from accelerate import dispatch_model

from gradmap.common.errors import UserError
from gradmap.data.calibration import build_calibration
from gradmap.methods.gradmap.ghost_norms import (
    direct_squares,
    ghost_is_cheaper,
    ghost_squares,
    gradient_norms,
)
from gradmap.methods.gradmap.scores import (
    gradient_scores,
    gradient_scores_reference,
    streamed_gradient_scores,
)
from gradmap.model.batching import LOGITS_BYTES, Batches
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import (
    divergences_from,
    logits_from,
    losses_from,
    run_layers,
    sample_divergences_reference,
    sample_losses,
)
from gradmap.model.loading import load_model, load_tokenizer
from gradmap.model.precision import computing_in, count_parameters
from tests.conftest import BOOLQ
from tests.families import LAYERS, VOCABULARY
from tests.gradmap.removals import pairs


def test_scores_equal_the_per_sample_reference(pico, input_ids):
    model = pico.load()
    expected = gradient_scores_reference(LayeredModel.of(model), input_ids)
    actual = gradient_scores(LayeredModel.of(model), input_ids, Batches(2))
    # float64 throughout; the squares of a ghost norm cancel at most a few digits: half the mantissa
    # remains
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)


def test_scores_after_a_removal_are_those_of_the_smaller_model(pico, input_ids):
    model = pico.load()
    with LayeredModel.of(model).without(pairs(1, 3)):
        actual = gradient_scores(LayeredModel.of(model), input_ids, Batches(5))
        expected = gradient_scores_reference(LayeredModel.of(model), input_ids)
    assert actual.shape == (3,)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)


def test_long_samples_take_the_direct_formula(picos):
    """At 60 tokens, forming the gradient of a pico's weights is cheaper than two Gram matrices."""
    pico = picos["qwen3_moe"]
    ids = torch.randint(3, VOCABULARY, (3, 60), generator=torch.Generator().manual_seed(2))
    model = pico.load()
    actual = gradient_scores(LayeredModel.of(model), ids, Batches(3))
    torch.testing.assert_close(
        actual, gradient_scores_reference(LayeredModel.of(model), ids), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("tokens", [2, 200])
def test_both_formulas_give_the_norm_of_the_explicit_gradient(tokens):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, tokens, 16, generator=generator, dtype=torch.float64)
    gradient = torch.randn(3, tokens, 12, generator=generator, dtype=torch.float64)
    expected = torch.stack([(gradient[j].mT @ inputs[j]).square().sum() for j in range(3)])
    torch.testing.assert_close(ghost_squares(inputs @ inputs.mT, gradient), expected)
    torch.testing.assert_close(direct_squares(inputs, gradient), expected)
    assert ghost_is_cheaper(tokens, 12, 16) == (tokens == 2)


def test_no_parameter_gradient_is_ever_formed(picos, input_ids):
    pico = picos["mixtral"]
    model = pico.load()
    gradient_scores(LayeredModel.of(model), input_ids, Batches(2))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_and_its_gradient_are_those_of_cross_entropy(picos, input_ids):
    """Also with Gemma 2's capped logits."""
    pico = picos["gemma2"]
    model = pico.load()
    hidden = (
        model.base_model(input_ids=input_ids, output_hidden_states=True)
        .hidden_states[-2]
        .requires_grad_()
    )
    losses = losses_from(LayeredModel.of(model), hidden, input_ids)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    logits = model.lm_head(model.model.norm(hidden))
    capped = (
        torch.tanh(logits / model.config.final_logit_softcapping)
        * model.config.final_logit_softcapping
    )
    expected = sample_losses(capped, input_ids)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), hidden)[0])


def test_divergences_are_those_of_the_definition(picos, input_ids):
    model = picos["gemma2"].load()  # whose logits are capped
    hidden = run_layers(LayeredModel.of(model), input_ids)
    other = hidden + 0.1 * hidden.roll(1, dims=0)
    logits, dense = (
        logits_from(LayeredModel.of(model), states, input_ids) for states in (other, hidden)
    )
    expected = sample_divergences_reference(logits, dense)
    assert expected.min() > 1e-3
    actual = divergences_from(LayeredModel.of(model), other, hidden, input_ids)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("logits_bytes", [1, LOGITS_BYTES["cpu"]])
def test_a_nan_loss_names_the_sample(picos, input_ids, monkeypatch, logits_bytes):
    """Whether the output layer takes the samples of a batch one by one or together."""
    monkeypatch.setitem(LOGITS_BYTES, "cpu", logits_bytes)
    pico = picos["llama"]
    model = pico.load(torch.float32)
    poisoned = int(input_ids[3, 0])
    model.get_input_embeddings().weight[poisoned] = float("nan")
    ids = torch.where(input_ids == poisoned, poisoned + 1, input_ids)
    ids[3, 0] = poisoned
    with pytest.raises(UserError, match="sample 3"):
        gradient_scores(LayeredModel.of(model), ids, Batches(2))


def test_float32_scores_on_smollm2(smollm2):
    calibration = build_calibration(
        load_tokenizer(smollm2.directory), BOOLQ, samples=4, tokens=128, seed=42
    )
    model = load_model(smollm2, "float32")
    actual = gradient_scores(LayeredModel.of(model), calibration.input_ids, Batches(4))
    expected = gradient_scores_reference(LayeredModel.of(model), calibration.input_ids)
    # float32 rounding of about 1e-7 per product, over 128 x 128 products of mixed sign in a ghost
    # norm
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)
    assert actual.argsort().tolist() == expected.argsort().tolist()


def test_autocast_scores_on_smollm2_differ_by_the_rounding_of_its_products(smollm2):
    calibration = build_calibration(
        load_tokenizer(smollm2.directory), BOOLQ, samples=4, tokens=128, seed=42
    )
    exact = load_model(smollm2, "float32")
    expected = gradient_scores(LayeredModel.of(exact), calibration.input_ids, Batches(4))
    model = load_model(smollm2, "autocast")
    assert model.get_input_embeddings().weight.dtype == torch.float32
    # though the head has parted
    assert count_parameters(model) == count_parameters(exact) == 134_515_008
    with computing_in("autocast", model):
        actual = gradient_scores(LayeredModel.of(model), calibration.input_ids, Batches(4))
    assert not torch.equal(actual, expected)
    # a product is rounded to 8 bits (2^-9), and layer after layer adds to that
    torch.testing.assert_close(actual, expected, rtol=30 * 2**-9, atol=0)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_that_accelerate_has_placed_scores_the_same(picos, input_ids, family):
    """As `--device spread` does over GPUs; here all parts are on the CPU, with accelerate's hooks
    around each."""
    pico = picos[family]
    model = pico.load()
    with LayeredModel.of(model).without(pairs(2)):
        expected = gradient_scores_reference(LayeredModel.of(model), input_ids)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    placement = dict.fromkeys(
        [*parts, *(f"model.layers.{index}" for index in range(LAYERS))], "cpu"
    )
    dispatch_model(model, placement, main_device="cpu", force_hooks=True)
    assert all(hasattr(layer, "_hf_hook") for layer in pico.architecture.layer_list(model))
    with LayeredModel.of(model).without(pairs(2)):
        actual = gradient_scores(LayeredModel.of(model), input_ids, Batches(2))
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)
    # the hooks are still there
    assert all("forward" in vars(layer) for layer in pico.architecture.layer_list(model))


def across_devices(pico):
    """Relative tolerance. A router takes its softmax in float32, and two devices' exponentials
    differ by up to two units in the last place (2^-23 each); what a token gets from an expert is a
    ratio of two of them."""
    return 4 * 2**-23 if pico.family == "mixtral" else 1e-7


@pytest.mark.gpu
def test_a_model_spread_over_gpus_scores_the_same(pico, input_ids):
    spread = load_model(pico.checkpoint, "float64", "spread")
    actual = gradient_scores(LayeredModel.of(spread), input_ids, Batches(2))
    expected = gradient_scores_reference(pico.layered(), input_ids)
    torch.testing.assert_close(actual, expected, rtol=across_devices(pico), atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("streamed", [False, True])
def test_scores_on_a_gpu_are_those_of_the_cpu(pico, input_ids, streamed):
    model = load_model(pico.checkpoint, "float64", "cuda", streamed=streamed)
    if streamed:
        actual = streamed_gradient_scores(LayeredModel.of(model), input_ids, Batches(2), [])
    else:
        actual = gradient_scores(LayeredModel.of(model), input_ids, Batches(2))
    expected = gradient_scores_reference(pico.layered(), input_ids)
    torch.testing.assert_close(actual, expected, rtol=across_devices(pico), atol=0)


def test_float16_does_not_end_at_an_attention_sink():
    """Hidden states of 300 in 64 dimensions: the square of one token is 5.8 million, and float16
    ends at 65504."""
    layer = torch.nn.Linear(64, 64, bias=False)
    inputs = torch.full((2, 8, 64), 300.0)
    norms = {}
    for dtype in (torch.float64, torch.float16):
        totals = torch.zeros(1, dtype=torch.float64)
        layer.to(dtype)
        with gradient_norms([layer], 2, totals):
            layer(inputs.to(dtype).requires_grad_(True)).sum().backward()
        norms[dtype] = totals.item()
    # the gradient of every weight is 8 * 300, which both dtypes hold exactly
    assert norms[torch.float16] == pytest.approx(norms[torch.float64], rel=1e-6)
    assert norms[torch.float64] == pytest.approx(2 * 64 * 8 * 300)
