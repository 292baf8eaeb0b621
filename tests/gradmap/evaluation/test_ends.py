"""An answer ends where transformers ends it."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from gradmap.errors import UserError
from gradmap.evaluation.ends import end_tokens, until_end
from gradmap.evaluation.subjects import Where, find_subjects
from gradmap.reading import read_json

PROMPT = [5, 6, 7]


@pytest.fixture
def directory(picos, tmp_path):
    return shutil.copytree(picos["llama"].directory, tmp_path / "model")


def generated(directory):
    (subject,) = find_subjects(str(directory), None, False, None, None, Where(device="cpu"))
    with subject.open() as opened:
        return opened.backend.generate([PROMPT], 12)[0]


def generated_by_transformers(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    output = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("place", [0, 2])
def test_every_end_of_the_generation_config_ends_an_answer(directory, place):
    whole = generated(directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps(read_json(path) | {"eos_token_id": [2, whole[place]]}))
    answer = generated(directory)
    assert answer == until_end(whole, [whole[place]])
    assert generated_by_transformers(directory) == [*answer, whole[place]]


def test_ends_are_the_generation_configs_or_else_the_configs(tmp_path):
    assert end_tokens(tmp_path, {"eos_token_id": 2}) == (2,)
    assert end_tokens(tmp_path, {"eos_token_id": [2, 3]}) == (2, 3)
    assert end_tokens(tmp_path, {}) == ()
    path = tmp_path / "generation_config.json"
    path.write_text("{}")
    assert end_tokens(tmp_path, {"eos_token_id": 2}) == (2,)
    path.write_text('{"eos_token_id": 4}')
    assert end_tokens(tmp_path, {"eos_token_id": 2}) == (4,)


@pytest.mark.parametrize("found", ["2", [[2]], True, -1, 2.0, {}, [None]])
def test_ends_that_are_no_ids_are_refused(tmp_path, found):
    with pytest.raises(UserError, match=r"config\.json: eos_token_id is .* neither a token id"):
        end_tokens(tmp_path, {"eos_token_id": found})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is"):
        end_tokens(tmp_path, {"eos_token_id": 2})
