"""Prompts: the same for every arm, fresh for every load, of the lengths that were asked for."""

import json

import pytest

from gradmap.common.errors import UserError
from gradmap.model.loading import load_tokenizer
from loadtest.conversations import RecordCount
from loadtest.loads import ClosedLoop, OpenLoop
from loadtest.prompts import Prompt, RandomPrompts, TextPrompts, Workload
from loadtest.workload import draw_requests, load_requests, save_requests


def test_random_prompts_are_the_same_for_a_name_and_share_only_what_is_shared():
    prompts = RandomPrompts(Workload(prompt_tokens=20, shared_prefix=4), 1000)
    first, again, other = (prompts.take(name, 5) for name in ("a", "a", "b"))
    assert first == again
    assert len({prompt.token_ids[:4] for prompt in first}) == 1
    assert len({prompt.token_ids[4:] for prompt in [*first, *other]}) == 10
    assert first[0].token_ids[:4] != other[0].token_ids[:4]
    assert {len(prompt.token_ids) for prompt in first} == {20}


def test_lengths_vary_by_the_share_that_was_asked_for():
    prompts = RandomPrompts(
        Workload(prompt_tokens=100, output_tokens=50, length_spread=0.5), 10
    ).take("a", 400)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert len(set(lengths)) > 50
    outputs = [prompt.output_tokens for prompt in prompts]
    # of a uniform variable on 25..75: mean 50, standard error 14.4 / 20 = 0.72; six of them
    assert sum(outputs) / 400 == pytest.approx(50, abs=4.4)
    assert {
        RandomPrompts(Workload(output_tokens=2, length_spread=0.9), 9).take("a", 1)[0].output_tokens
    } <= {2, 3, 4}


@pytest.fixture
def tokenizer(picos):
    return load_tokenizer(picos["llama"].directory)


def test_texts_are_cut_and_never_used_twice(tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"w{3 + index} w4 w5 w6"}) + "\n" for index in range(10))
    )
    prompts = TextPrompts(
        Workload(prompt_tokens=3, output_tokens=7, texts=f"file:{path}"), tokenizer
    )
    first, second = prompts.take("a", 4), prompts.take("b", 6)
    assert prompts.take("a", 4) == first
    assert len({prompt.token_ids for prompt in [*first, *second]}) == 10
    assert {(prompt.token_ids[1:], prompt.output_tokens) for prompt in first} == {((4, 5), 7)}
    with pytest.raises(UserError, match="has 10 texts, and every load wants fresh ones"):
        prompts.take("c", 1)


def test_prompts_of_json_lines_know_what_was_skipped(tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "w3"}\n{"text": 1}\n{"te')
    prompts = TextPrompts(Workload(texts=f"file:{path}"), tokenizer)
    assert prompts.records == RecordCount(3, 2)
    assert prompts.take("a", 1)[0].token_ids == (3,)
    assert RandomPrompts(Workload(), 10).records is None


def test_conversations_give_the_question_and_the_length_of_the_answer(tokenizer, tmp_path):
    path = tmp_path / "share.json"
    turns = [{"from": "human", "value": "w3 w4"}, {"from": "gpt", "value": "w5 w6 w7"}]
    unusable = [
        {"conversations": turns[1:]},
        {"conversations": []},
        {"conversations": [turns[1], turns[0]]},
    ]
    path.write_text(json.dumps([{"id": "1", "conversations": turns}, *unusable]))
    prompts = TextPrompts(Workload(output_tokens=9, texts=f"sharegpt:{path}"), tokenizer)
    assert prompts.take("a", 1) == [Prompt((3, 4), 3)]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("[{", "is no list of records.*cut short"),
        ("[" * 10**5, "is no list of records.*cut short"),
        ("{", r"no conversation .*1 records"),
        ("", r"no conversation .*0 records"),
        ("[]", r"no conversation .*0 records"),
        ("[1, null]", r"no conversation .*2 records"),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer, tmp_path, contents, message):
    path = tmp_path / "share.json"
    path.write_text(contents)
    with pytest.raises(UserError, match=message):
        TextPrompts(Workload(texts=f"sharegpt:{path}"), tokenizer)
    with pytest.raises(UserError, match="does not exist"):
        TextPrompts(Workload(texts=f"sharegpt:{path}.none"), tokenizer)


def test_requests_come_back_from_their_file(tmp_path):
    prompts = RandomPrompts(Workload(prompt_tokens=3), 10)
    for load in (ClosedLoop(2), OpenLoop("constant", 4.0)):
        requests = draw_requests(prompts, "a", 3, load, 0)
        save_requests(tmp_path / "requests.json", requests)
        assert load_requests(tmp_path / "requests.json") == requests
    assert [request.due_s for request in requests] == [0.0, 0.25, 0.5]
