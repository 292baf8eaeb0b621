"""Healing on conversations, which are known again when the plan is evaluated."""

import json
import subprocess
import sys

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.evaluation.contamination import GRAM_TOKENS, CalibratedOn
from gradmap.healing.heal import heal
from gradmap.healing.options import HealOptions
from gradmap.healing.written import prompts_of, written_documents
from gradmap.methods.writing import PROMPT_TOKENS, draw_tokens, uniform_numbers
from gradmap.model.loading import load_tokenizer
from gradmap.pruning.plan import load_plan
from tests.command_line import gradmap
from tests.conftest import make_pico
from tests.gradmap.healing.small_healings import manual_plan

TOKENS, STEP = 48, 96
# The role stands behind a special token, as in ChatML.
TEMPLATE = (
    "{% for message in messages %}<s> {{ 'w3' if message.role == 'user' else 'w4' }} "
    "{{ message.content }} </s> {% endfor %}{% if add_generation_prompt %}<s> w4{% endif %}"
)


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / "llama"
    # vLLM has no kernel for narrower heads
    pico = make_pico("llama", directory, head_dim=32, max_position_embeddings=2 * TOKENS)
    tokenizer = load_tokenizer(pico.directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(pico.directory)
    return pico


def content(start, words):
    return " ".join(f"w{5 + (7 * start + 11 * place) % 190}" for place in range(words))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    turns = [
        [
            {"from": "human", "value": content(start, 14 + start % 5)},
            {"from": "gpt", "value": content(start + 90, 15 + start % 3)},
        ]
        for start in range(80)
    ]
    path = tmp_path_factory.mktemp("texts") / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    return path


@pytest.fixture(scope="module")
def plan(pico, word_file, tmp_path_factory):
    return manual_plan(pico, word_file, tmp_path_factory.mktemp("plans") / "plan")


@pytest.fixture(scope="module")
def options(conversations):
    return HealOptions(
        text=[f"file:{conversations}#messages"],
        chat=True,
        tokens=TOKENS,
        step_tokens=STEP,
        budget_tokens=10 * STEP,
        rank=2,
        held_out=4,
        dtype="float64",
    )


@pytest.fixture(scope="module")
def healed(pico, plan, options, tmp_path_factory):
    out = tmp_path_factory.mktemp("healed") / "healed"
    heal(pico.checkpoint, plan, options, out)
    return out


def test_turns_that_were_trained_on_are_known_without_what_stands_around_them(
    pico, plan, healed, conversations
):
    tokenizer = load_tokenizer(pico.directory)
    before = len(CalibratedOn.of_plan(plan, tokenizer).texts)
    known = CalibratedOn.of_plan(healed, tokenizer).texts[before:]
    records = map(json.loads, conversations.read_text().splitlines())
    turns = [turn["value"] for record in records for turn in record["messages"]]
    whole = [text for text in known if text in turns]
    # of a sample of three turns, two at most are cut by its ends
    assert len(whole) >= load_plan(healed).healing[0].samples
    assert all(len(text.split()) >= GRAM_TOKENS - 1 for text in known)


def test_a_text_of_a_turn_that_was_trained_on_is_refused(pico, healed, conversations, tmp_path):
    turns = [json.loads(line)["messages"] for line in conversations.read_text().splitlines()]
    copy = tmp_path / "questions.jsonl"
    copy.write_text("\n".join(json.dumps({"text": one[0]["value"]}) for one in turns))
    refused = gradmap(
        *("eval", "--model", pico.directory, "--plan", healed, "--segment", 32),
        *("--perplexity", f"own=file:{copy}", "--out", tmp_path / "eval.json"),
    )
    assert refused.returncode == 2
    assert "overlaps with the healing samples" in refused.stderr


def known_texts(pico, plan):
    return CalibratedOn.of_plan(plan, load_tokenizer(pico.directory)).texts


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "written"


def with_written(options, **changes):
    return options.model_copy(update={"written": 2000, "mix": [1.0, 3.0], **changes})


def test_what_the_dense_model_answers_is_trained_on_and_written_once(
    pico, plan, options, conversations, tmp_path, cache, capsys
):
    asked = with_written(options)
    once = heal(pico.checkpoint, plan, asked, tmp_path / "once")
    assert "The dense model writes (tokens)" in capsys.readouterr().err
    assert len(list(cache.glob("*.safetensors"))) == 1
    again = heal(pico.checkpoint, plan, asked, tmp_path / "again")
    told = capsys.readouterr().err
    assert "wrote before is read from" in told and "model writes" not in told
    assert again.healing[0].curve[-1].tokens == once.healing[0].curve[-1].tokens
    assert again.healing[0].lowest_divergence == once.healing[0].lowest_divergence
    assert set(once.healing[0].passes) == {*asked.text, "--written"}
    # without the file, what was trained on of texts is still known, and the questions
    for file in cache.glob("*.safetensors"):
        file.unlink()
    known = known_texts(pico, tmp_path / "once")
    assert "cannot be drawn" not in capsys.readouterr().err
    records = map(json.loads, conversations.read_text().splitlines())
    questions = {record["messages"][0]["value"] for record in records}
    # all are asked, but for those that are held out
    assert len(questions.intersection(known)) >= len(questions) - 4


def test_documents_are_questions_with_answers_of_the_dense_model(pico, options, cache):
    tokenizer, asked = load_tokenizer(pico.directory), with_written(options)
    documents = written_documents(pico.checkpoint, asked, tokenizer)
    prompts = prompts_of(asked, tokenizer)
    held_out = asked.mixture.without_written.open(tokenizer).streams[0].documents.left_out
    assert sum(map(len, documents)) >= 2000 > sum(map(len, documents[:-1]))
    assert held_out
    model = pico.load()
    for document, prompt in zip(documents[:12], prompts, strict=False):
        answer = list(document[len(prompt) :])
        assert list(document[: len(prompt)]) == prompt
        assert 1 <= len(answer) <= TOKENS
        assert len(answer) == TOKENS or answer[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in answer[:-1]
        assert tokenizer.decode(prompt).endswith("<s> w4")
    numbers = uniform_numbers(64, TOKENS, asked.seed)
    for place in (0, 5):  # as each alone would be
        ids = torch.tensor([prompts[place]])
        for number in numbers[place, : len(documents[place]) - ids.shape[1]].view(-1, 1, 1):
            ids = torch.cat([ids, draw_tokens(model(ids).logits[:, -1], number)], dim=1)
        assert tuple(ids[0].tolist()) == documents[place]


def test_no_question_of_a_held_out_conversation_is_asked(pico, options, conversations):
    tokenizer, asked = load_tokenizer(pico.directory), with_written(options, written=40_000)
    records = map(json.loads, conversations.read_text().splitlines())
    known = {record["messages"][0]["value"] for record in records}
    spoken = {
        tokenizer.decode(prompt).removeprefix("<s> w3 ").removesuffix(" </s> <s> w4")
        for prompt in prompts_of(asked, tokenizer)
    }
    held_out = len(asked.mixture.without_written.open(tokenizer).streams[0].documents.left_out)
    assert spoken < known
    assert len(spoken) == len(known) - held_out


def test_without_chat_texts_are_gone_on_with(pico, word_file, options, cache):
    changes = {"chat": False, "text": [f"file:{word_file}"], "written": 500, "tokens": 16}
    asked = with_written(options, **changes)
    tokenizer = load_tokenizer(pico.directory)
    documents = written_documents(pico.checkpoint, asked, tokenizer)
    assert [len(document) for document in documents] == 32 * [16]
    words = word_file.read_text()
    for document in documents:
        assert tokenizer.decode(document[:PROMPT_TOKENS]).replace(" </s> ", '"}') in words or (
            tokenizer.eos_token_id in document[:PROMPT_TOKENS]
        )
    other = written_documents(pico.checkpoint, with_written(options, **changes, seed=1), tokenizer)
    assert other != documents
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_a_damaged_file_is_written_again(pico, options, cache):
    tokenizer, asked = load_tokenizer(pico.directory), with_written(options, written=300)
    documents = written_documents(pico.checkpoint, asked, tokenizer)
    (file,) = cache.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-40])
    assert written_documents(pico.checkpoint, asked, tokenizer) == documents
    assert written_documents(pico.checkpoint, options, tokenizer) is None


def test_a_conversation_that_nobody_asks_in_is_refused(pico, options, tmp_path):
    path = tmp_path / "told.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "assistant", "content": content(start, 20)}]})
            for start in range(40)
        )
    )
    asked = with_written(options, text=[f"file:{path}#messages"])
    with pytest.raises(UserError, match="--written has nothing to answer"):
        prompts_of(asked, load_tokenizer(pico.directory))


@pytest.mark.alone
def test_vllm_writes_what_transformers_might_have(pico, plan, conversations, tmp_path, cache):
    text = f"file:{conversations}#messages"
    arguments = (
        *("heal", "--model", pico.directory, "--plan", plan, "--text", text, "--chat"),
        *("--written", 2000, "--writer", "vllm", "--dtype", "float32", "--held-out", 4),
        *("--tokens", TOKENS, "--step-tokens", STEP, "--budget-tokens", STEP),
    )
    # in a process of its own: vLLM's settings would stay in the environment of ours
    command = [sys.executable, "-m", "gradmap", *map(str, arguments)]
    finished = subprocess.run(
        [*command, "--out", str(tmp_path / "healed")], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    asked = HealOptions(**load_plan(tmp_path / "healed").healing[0].recipe)
    tokenizer, model = load_tokenizer(pico.directory), pico.load()
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("gradmap.healing.written.VllmWriter.started", None)
        documents = written_documents(pico.checkpoint, asked, tokenizer)  # what was kept
    surprises = []
    for document, prompt in zip(documents, prompts_of(asked, tokenizer), strict=False):
        answer = list(document[len(prompt) :])
        assert list(document[: len(prompt)]) == prompt
        assert 1 <= len(answer) <= TOKENS
        assert len(answer) == TOKENS or answer[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in answer[:-1]
        logits = model(input_ids=torch.tensor([document])).logits[0, len(prompt) - 1 : -1]
        chances = logits.log_softmax(dim=-1)
        entropies = -(chances.exp() * chances).sum(dim=-1)
        surprises.append(-chances[range(len(answer)), answer] - entropies)
    # drawn from the model's own distribution, tokens are as unlikely as it is uncertain
    surprise = torch.cat(surprises)
    assert surprise.mean().abs() < 4 * surprise.std() / len(surprise) ** 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"writer": "vllm"}, "--writer vllm runs the model while it writes.*give --written"),
        ({"writer": "llama.cpp", "written": 9}, "writer"),
    ],
)
def test_a_writer_that_has_nothing_to_write_is_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        HealOptions(**options.model_dump(exclude_unset=True) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 97}, "takes 96 tokens at once; lower --tokens to that"),
        ({"tokens": 49, "written": 9}, "may have 98 tokens together.* lower --tokens to 48"),
    ],
)
def test_samples_beyond_the_context_are_refused(
    pico, plan, options, tmp_path, cache, changes, message
):
    with pytest.raises(UserError, match=message):
        heal(pico.checkpoint, plan, options.model_copy(update=changes), tmp_path / "healed")
    assert not (tmp_path / "healed").exists()
