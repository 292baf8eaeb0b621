"""An answer ends where transformers ends it."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from gradmap.common.errors import UserError
from gradmap.common.reading import read_json
from gradmap.evaluation.evaluated_models import Where, find_models
from gradmap.model.ends import end_tokens, until_end

PROMPT = [5, 6, 7]


@pytest.fixture
def directory(picos, tmp_path):
    return shutil.copytree(picos["llama"].directory, tmp_path / "model")


def generated(directory):
    (evaluated,) = find_models(str(directory), None, False, None, None, Where(device="cpu"))
    with evaluated.open() as opened:
        return opened.backend.generate([PROMPT], 12)[0]


def generated_by_transformers(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    output = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("place", [0, 2])
def test_every_end_of_the_generation_config_ends_an_answer(directory, place):
    whole = generated(directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps(read_json(path) | {"eos_token_id": [2, whole[place]]}))
    answer = generated(directory)
    assert answer == until_end(whole, [whole[place]])
    assert generated_by_transformers(directory) == [*answer, whole[place]]


SETTINGS = {
    "repetition_penalty": lambda whole: 5.0,
    "no_repeat_ngram_size": lambda whole: 1,
    "suppress_tokens": lambda whole: whole[:1],
    "begin_suppress_tokens": lambda whole: whole[:1],
    "bad_words_ids": lambda whole: [whole[:1]],
    "sequence_bias": lambda whole: [[whole[:1], -100.0]],
    "forced_eos_token_id": lambda whole: 2,
    "min_new_tokens": lambda whole: 12,
    "guidance_scale": lambda whole: 3.0,
    "watermarking_config": lambda whole: {"bias": 50.0},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_answer_is_what_the_model_finds_most_likely_whatever_its_generation_config_asks_for(
    directory, setting
):
    """As in ONNX Runtime and vLLM, which are given none of these settings; transformers itself
    obeys them."""
    path = directory / "generation_config.json"
    whole = generated(directory)
    if setting == "min_new_tokens":  # which puts an end off
        path.write_text(json.dumps(read_json(path) | {"eos_token_id": whole[2]}))
    plain, theirs = generated(directory), generated_by_transformers(directory)
    path.write_text(json.dumps(read_json(path) | {setting: SETTINGS[setting](whole)}))
    assert generated(directory) == plain
    assert generated_by_transformers(directory) != theirs


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
