"""Conversations as people have them: lists or lines, with records that are of no use."""

import gzip
import json

import pytest

from gradmap.common.errors import UserError
from loadtest import conversations
from loadtest.conversations import RecordCount, first_exchange, read_conversations, read_documents


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
        *(
            1,
            None,
            "x",
            [],
            {},
            {"conversations": None},
            {"conversations": "x"},
            {"conversations": [1, 2]},
        ),
        *(
            {"conversations": turns}
            for turns in (
                *(
                    [],
                    [ASK],
                    [SYSTEM],
                    [SYSTEM, ASK],
                    [ANSWER, ASK],
                    [ASK, ASK],
                    [ASK, turn("gpt", " ")],
                ),
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


GOOD = [
    {"conversations": [turn("human", f"why {number}?"), ANSWER], "text": f"t {number}"}
    for number in range(5)
]
BAD = [
    None,
    {"conversations": [], "text": " "},
    7,
    {"conversations": 1, "text": 1},
    {"conversations": {}, "text": None},
]


def read(kind, path, seed=0):
    """The texts alone of either kind of file, and the counts."""
    if kind == "sharegpt":
        pairs, count = read_conversations(path, seed)
        assert {answer for _, answer in pairs} == {"so."}
    else:
        pairs, count = read_documents(path, "text", seed)
        assert {answer for _, answer in pairs} == {None}
    return [text for text, _ in pairs], count


TEXTS = {
    "sharegpt": [f"why {number}?" for number in range(5)],
    "jsonl": [f"t {number}" for number in range(5)],
}
either_kind = pytest.mark.parametrize("kind", TEXTS)


@either_kind
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("lines", [True, False])
def test_records_of_no_use_are_skipped_and_counted(tmp_path, monkeypatch, lines, mark, kind):
    said: list = []
    monkeypatch.setattr(conversations, "say", said.append)
    path = tmp_path / "share.json"
    records = [*BAD, *GOOD]
    text = (
        "\n".join(map(json.dumps, records)) + "\n\n{broken\n"
        if lines
        else json.dumps(records, indent=1)
    )
    path.write_text(mark + text)
    texts, count = read(kind, path)
    assert sorted(texts) == TEXTS[kind]
    assert texts != sorted(texts) == sorted(read(kind, path, seed=1)[0])
    assert count == (RecordCount(11, 6) if lines else RecordCount(10, 5))
    assert said[0].startswith(
        f"{count.skipped} of {count.records} records of {path} are skipped: they have no "
    )
    path.write_text(json.dumps(GOOD))
    said.clear()
    assert read(kind, path)[1] == RecordCount(5, 0)
    assert said == []


@pytest.mark.parametrize("first", ["[1]", "[" * 10, "{", "7"])
def test_the_first_line_may_be_the_one_of_no_use(tmp_path, first):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([first, *map(json.dumps, GOOD)]))
    if first.startswith("[["):  # what might be a list of all that follows
        with pytest.raises(UserError, match="cut short"):
            read("jsonl", path)
    else:
        assert read("jsonl", path)[1] == RecordCount(6, 1)


@either_kind
def test_a_text_that_comes_twice_is_one_prompt(tmp_path, kind):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, GOOD * 2)))
    texts, count = read(kind, path)
    assert sorted(texts) == TEXTS[kind]
    assert count == RecordCount(10, 0)


def test_a_nested_field_may_be_missing_in_some_records(tmp_path):
    with gzip.open(path := tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"doc": {"body": "a"}}\n{"doc": {}}\n{"doc": 1}\n[1]\n')
    assert read_documents(path, "doc.body", 0) == ([("a", None)], RecordCount(4, 3))


@pytest.mark.parametrize("contents", ["", "[]", "[1]", "{broken", '{"text": 1}\n{"body": "a"}'])
def test_json_lines_with_nothing_of_use_are_refused(tmp_path, contents):
    path = tmp_path / "a.jsonl"
    path.write_text(contents)
    with pytest.raises(UserError, match=r"a\.jsonl has no text in a field 'text' \(\d records\)"):
        read("jsonl", path)


def test_halves_of_characters_survive(tmp_path):
    path = tmp_path / "share.jsonl"
    turns = [turn("human", "a\ud83d b \U0001f642"), turn("gpt", "\udc00")]
    path.write_text(json.dumps({"conversations": turns, "text": "\ud83d a"}) + "\n")
    ((pair,), _) = read_conversations(path, 0)
    assert pair == ("a\ufffd b \U0001f642", "\ufffd")
    "".join(pair).encode()
    assert read_documents(path, "text", 0)[0] == [("\ufffd a", None)]


@either_kind
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding, kind):
    path = tmp_path / "share.json"
    path.write_bytes(
        ("" if encoding == "utf-16" else "\ufeff").encode(encoding)
        + json.dumps(GOOD).encode(encoding)
    )
    with pytest.raises(UserError, match=r"share\.json is in UTF-16; convert it to UTF-8"):
        read(kind, path)
