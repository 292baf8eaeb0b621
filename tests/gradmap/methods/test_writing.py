"""What a model writes behind prompts of several lengths."""

import pytest
import torch

from gradmap.methods.writing import uniform_numbers, write_answers, write_on
from tests.conftest import make_pico


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "bloom", "mpt"])
def test_prompts_of_several_lengths_are_answered_as_each_alone(tmp_path, family):
    """Rotary, learned and offset positions; windows; positions that the model is not told."""
    model = make_pico(family, tmp_path).layered()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 190, (n,), generator=generator).tolist() for n in (3, 9, 1, 6)]
    numbers = uniform_numbers(len(prompts), 12, seed=3)
    together = write_answers(model, prompts, numbers, ends=())
    for row, prompt in enumerate(prompts):
        alone = write_on(model, torch.tensor([prompt]), numbers[row : row + 1])
        assert together[row] == alone[0].tolist()
        ends = {together[row][len(prompt) + 4]}
        (ended,) = write_answers(model, [prompt], numbers[row : row + 1], ends)
        assert ended[-1] in ends and ended == together[row][: len(ended)]
