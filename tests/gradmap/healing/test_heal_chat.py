"""Healing on conversations, which are known again when the plan is evaluated."""

import json

import pytest

from gradmap.evaluation.contamination import GRAM_TOKENS, CalibratedOn
from gradmap.healing.heal import heal
from gradmap.healing.options import HealOptions
from gradmap.model.loading import load_tokenizer
from gradmap.pruning.plan import load_plan
from gradmap.pruning.prune import prune
from gradmap.pruning.settings import PruneSettings
from tests.command_line import gradmap
from tests.conftest import make_pico

TOKENS, STEP = 48, 96
# The role stands behind a special token, as in ChatML.
TEMPLATE = (
    "{% for message in messages %}<s> {{ 'w3' if message.role == 'user' else 'w4' }} "
    "{{ message.content }} </s> {% endfor %}{% if add_generation_prompt %}<s> w4{% endif %}"
)


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    pico = make_pico("llama", tmp_path_factory.mktemp("chat") / "llama")
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
    plan = tmp_path_factory.mktemp("plans") / "plan"
    settings = PruneSettings(
        selector="manual",
        layers=["1"],
        compensator="none",
        remove=1,
        calibration=f"file:{word_file}",
        samples=4,
        tokens=16,
        dtype="float64",
    )
    prune(pico.checkpoint, settings, plan)
    return plan


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
