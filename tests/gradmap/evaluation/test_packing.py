"""Requests go through a model together only where each gets what it gets by itself."""

import pytest
import torch

from gradmap.evaluation.packing import what_goes_together
from gradmap.evaluation.transformers_backend import TransformersBackend, score_reference
from tests.conftest import make_pico
from tests.families import MORE_CONFIGS, PICO_CONFIGS
from tests.gradmap.evaluation.test_scoring import random_requests

# From the mask follow the positions of the first two, and chunks of attention in the third.
APART = ("bloom", "mpt", "llama4_text")


@pytest.mark.parametrize("family", APART)
def test_what_a_model_does_not_take_together_is_scored_by_itself(family, tmp_path):
    model = make_pico(family, tmp_path).load()
    requests = random_requests(torch.Generator().manual_seed(5))
    scores = TransformersBackend(model, "float64").score(requests)
    for request, score in zip(requests, scores, strict=True):
        expected = score_reference(model, request)
        # positions and routers are float32 there: 2^-24, in 5 layers of sums of 40
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-6)


@pytest.mark.parametrize("family", APART)
def test_prompts_of_any_length_are_answered_as_by_themselves(family, tmp_path):
    backend = TransformersBackend(make_pico(family, tmp_path).load(), "float64")
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15], [3, 4, 5]]
    assert backend.generate(prompts, 6) == [backend.generate([prompt], 6)[0] for prompt in prompts]


def test_what_goes_together_is_found_on_a_small_model():
    llama, mpt = (
        what_goes_together({"model_type": family, **(PICO_CONFIGS | MORE_CONFIGS)[family]})
        for family in ("llama", "mpt")
    )
    assert (llama.branches, llama.padding) == (True, True)
    assert not mpt.branches
    unknown = what_goes_together({"model_type": "llama", "hidden_act": "mystery"})
    assert (unknown.branches, unknown.padding) == (False, False)
