"""Conversations as samples to train on: what the chat template writes, with one BOS in a sample and
one EOS between conversations."""

import gzip
import json

import datasets
import pytest

from gradmap.common.errors import UserError
from gradmap.data.chat import ChatTemplate
from gradmap.data.conversations import turns_of
from gradmap.data.mixture import Mixture, Packing
from gradmap.data.texts import stream_texts
from gradmap.model.loading import load_tokenizer
from tests.conftest import BOS

EOS = 2
# As Llama's: BOS in front, EOS behind every turn.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + message.role) }}"
    "{% endif %}{{ 'w3' if message.role == 'user' else 'w4' }} {{ message.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w4{% endif %}"
)
ASKED = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]
SHARED = [{"from": "human", "value": "w10 w11"}, {"from": "gpt", "value": "w12"}]
RENDERED = "w3 w10 w11 </s> w4 w12 </s>"


@pytest.fixture
def tokenizer(pico_with_bos):
    tokenizer = load_tokenizer(pico_with_bos.directory)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def template(tokenizer):
    return ChatTemplate.of(tokenizer)


def saved(directory, rows, name="a.jsonl"):
    path = directory / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"file:{path}#messages"


@pytest.mark.parametrize("turns", [ASKED, SHARED])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "disk", "hub", "nested"])
def test_either_form_in_every_kind_of_source_is_rendered(tmp_path, template, turns, kind):
    row = {"messages": turns}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(row))
    (tmp_path / "b.jsonl").write_text(json.dumps({"chat": row}))
    table = datasets.Dataset.from_list([row])
    (tmp_path / "hub").mkdir()
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    spec = {
        "jsonl": f"file:{tmp_path}/a.jsonl#messages",
        "jsonl.gz": f"file:{tmp_path}/a.jsonl.gz#messages",
        "parquet": f"file:{tmp_path}/hub/train.parquet#messages",
        "disk": f"disk:{tmp_path}/saved:messages",
        "hub": f"hub:{tmp_path}/hub::train:messages",
        "nested": f"file:{tmp_path}/b.jsonl#chat.messages",
    }[kind]
    # BOS, which every sample begins with, is not doubled
    assert list(stream_texts(spec, 0, template.documents_at)) == [RENDERED]


@pytest.mark.parametrize("as_list", [True, False])
def test_a_file_of_recorded_conversations_is_rendered(tmp_path, template, as_list):
    records = [{"id": 1, "conversations": SHARED}, {"conversations": ASKED[:1]}]
    text = json.dumps(records, indent=1) if as_list else "\n".join(map(json.dumps, records))
    (tmp_path / "share.json").write_text(text)
    found = list(stream_texts(f"sharegpt:{tmp_path}/share.json", 0, template.documents_at))
    assert found == [RENDERED, "w3 w10 w11 </s>"]


def test_samples_have_one_bos_and_one_eos_between_conversations(tokenizer, template):
    ids = Packing.of(tokenizer, 16).tokenise([RENDERED, "w20", RENDERED])
    rendered = [3, 10, 11, EOS, 4, 12, EOS]
    assert ids == [*rendered, 20, EOS, *rendered]


def test_conversations_and_text_are_mixed(tmp_path, tokenizer):
    chat = [
        {"messages": [{"role": "user", "content": f"w{n} w{n + 1}"}, ASKED[1]]}
        for n in range(20, 60)
    ]
    plain = [{"messages": f"w{n} w{n + 1} w{n + 2}"} for n in range(100, 150)]
    specs = saved(tmp_path, chat), saved(tmp_path, plain, "b.jsonl")
    mixture = Mixture(specs, (1.0, 1.0), tokens=13, held_out=4, seed=0, chat=True)
    samples = mixture.open(tokenizer)
    drawn = samples.draw(10)
    assert (drawn[:, 0] == BOS).all()
    assert not (drawn[:, 1:] == BOS).any()
    of_chat, of_plain = drawn[::2], drawn[1::2]
    assert (of_chat < 100).all()
    assert ((of_plain >= 100) | (of_plain == EOS) | (of_plain == BOS)).all()
    assert mixture.open(tokenizer).draw(10).equal(drawn)


def test_a_tokenizer_without_a_template_is_refused(picos):
    tokenizer = load_tokenizer(picos["llama"].directory)
    mixture = Mixture(("file:a.jsonl",), (1.0,), tokens=8, held_out=1, seed=0, chat=True)
    with pytest.raises(UserError, match=r"no chat template .*leave out --chat"):
        mixture.open(tokenizer)


def test_chat_without_conversations_is_refused(tmp_path, tokenizer):
    spec = saved(tmp_path, [{"messages": f"w{n} w9 w8 w7"} for n in range(20, 90)])
    mixture = Mixture((spec,), (1.0,), tokens=8, held_out=1, seed=0, chat=True)
    with pytest.raises(UserError, match="no conversations; name the field that holds them"):
        mixture.open(tokenizer)


def test_conversations_without_chat_are_refused(tmp_path, tokenizer):
    spec = saved(tmp_path, [{"messages": ASKED}])
    mixture = Mixture((spec,), (1.0,), tokens=8, held_out=1, seed=0)
    with pytest.raises(UserError, match=r"is a list, and no text; .*--chat"):
        mixture.open(tokenizer)


@pytest.mark.parametrize(
    "turns",
    [["a"], [{"role": "user"}], [{"role": "user", "content": 3}], [{"content": "a"}], [[ASKED]]],
)
def test_what_is_no_conversation_is_named(tmp_path, template, turns):
    spec = saved(tmp_path, [{"messages": ASKED}, {"messages": turns}])
    with pytest.raises(UserError, match="line 2: the field 'messages' is a list, and no convers"):
        list(stream_texts(spec, 0, template.documents_at))


def test_half_a_character_in_a_turn_is_refused(tmp_path, template):
    (tmp_path / "a.jsonl").write_text(
        r'{"messages": [{"role": "user", "content": "\ud800"}]}',
    )
    with pytest.raises(UserError, match="half of a character"):
        list(stream_texts(f"file:{tmp_path}/a.jsonl#messages", 0, template.documents_at))


def test_what_the_template_refuses_is_left_out_and_said_once(tmp_path, template, capsys):
    refused = [{"role": "narrator", "content": "w5"}]
    rows = [{"messages": turns} for turns in (refused, ASKED, None, [], refused)]
    assert list(stream_texts(saved(tmp_path, rows), 0, template.documents_at)) == [RENDERED]
    told = capsys.readouterr().err
    assert told.count("left out") == 1
    assert "line 1: no narrator" in told
    assert (template.rendered, template.refused) == (1, 2)


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    spoken = ChatTemplate.of(tokenizer).render(turns_of(ASKED))
    assert spoken == "26 Jul 2024 w10 w11"


def test_a_real_template_opens_turns_with_what_the_tokenizer_calls_bos(smollm2):
    tokenizer = load_tokenizer(smollm2.directory)
    turns = turns_of(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    )
    document = ChatTemplate.of(tokenizer).render(turns).strip()
    assert document.startswith("<|im_start|>system\n")
    ids = Packing.of(tokenizer, 128).tokenise([document, document])
    conversation = tokenizer.apply_chat_template([turn._asdict() for turn in turns])["input_ids"]
    assert ids == 2 * conversation[:-1]  # the template ends with a line's end, which is cut


@pytest.mark.parametrize("real", [True, False])
def test_marks_are_what_stands_around_turns(template, smollm2, real):
    if real:
        assert ChatTemplate.of(load_tokenizer(smollm2.directory)).marks == {
            "system You are a helpful AI assistant named SmolLM, trained by Hugging Face",
            "user",
            "assistant",
        }
    else:
        assert template.marks == {"w3", "w4"}
