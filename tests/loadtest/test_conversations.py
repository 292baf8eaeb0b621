"""Conversations as people have them: lists or lines, with records that are of no use."""

import json

import pytest

from gradmap.errors import UserError
from loadtest import conversations
from loadtest.conversations import first_exchange, read_conversations


def turn(who, text):
    return {"from": who, "value": text}


ASK, ANSWER, SYSTEM = turn("human", "why?"), turn("gpt", "so."), turn("system", "Be kind.")


@pytest.mark.parametrize(
    "turns",
    [
        [ASK, ANSWER],
        [SYSTEM, ASK, ANSWER],
        [SYSTEM, SYSTEM, ASK, SYSTEM, ANSWER, ASK],
        [turn("user", " why?\n"), turn("assistant", "so.")],
    ],
)
def test_the_first_exchange_is_what_follows_system_prompts(turns):
    assert first_exchange({"conversations": turns, "id": 3}) == ("why?", "so.")


@pytest.mark.parametrize(
    "record",
    [
        *(1, None, "x", [], {}, {"conversations": None}, {"conversations": "x"}, {"conversations": [1, 2]}),
        *(
            {"conversations": turns}
            for turns in (
                *([], [ASK], [SYSTEM], [SYSTEM, ASK], [ANSWER, ASK], [ASK, ASK], [ASK, turn("gpt", " ")]),
                *(
                    [ASK, turn("gpt", None)],
                    [ASK, turn("gpt", 3)],
                    [{"value": "why?"}, ANSWER],
                    [{"from": "user"}, ANSWER],
                ),
            )
        ),
    ],
)
def test_a_record_without_an_exchange_is_none(record):
    assert first_exchange(record) is None


GOOD = [{"conversations": [turn("human", f"why {number}?"), ANSWER]} for number in range(5)]
BAD = [None, {"conversations": []}, 7]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("lines", [True, False])
def test_records_of_no_use_are_skipped_and_counted(tmp_path, monkeypatch, lines, mark):
    said = []
    monkeypatch.setattr(conversations, "say", said.append)
    path = tmp_path / "share.json"
    records = [*BAD, *GOOD]
    text = "\n".join(map(json.dumps, records)) + "\n\n{broken\n" if lines else json.dumps(records, indent=1)
    path.write_text(mark + text)
    pairs = read_conversations(path, 0)
    assert sorted(pairs) == [(f"why {number}?", "so.") for number in range(5)]
    assert pairs != sorted(pairs) == sorted(read_conversations(path, 1))
    counts = "4 of 9" if lines else "3 of 8"
    assert said[0].startswith(f"{counts} records of {path} are skipped")
    path.write_text(json.dumps(GOOD))
    said.clear()
    assert len(read_conversations(path, 0)) == 5
    assert said == []


def test_halves_of_characters_survive(tmp_path):
    path = tmp_path / "share.jsonl"
    path.write_text(
        json.dumps({"conversations": [turn("human", "a\ud83d b \U0001f642"), turn("gpt", "\udc00")]}) + "\n"
    )
    (pair,) = read_conversations(path, 0)
    assert pair == ("a\ufffd b \U0001f642", "\ufffd")
    "".join(pair).encode()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding):
    path = tmp_path / "share.json"
    path.write_bytes(("" if encoding == "utf-16" else "\ufeff").encode(encoding) + json.dumps(GOOD).encode(encoding))
    with pytest.raises(UserError, match=r"share\.json is in UTF-16; convert it to UTF-8"):
        read_conversations(path, 0)
