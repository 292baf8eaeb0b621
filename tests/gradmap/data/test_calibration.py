"""Calibration samples and evaluation segments are reproducible, of the asked size, never padded,
and begin as the model expects a text to begin."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from gradmap.common.errors import UserError
from gradmap.data.calibration import bos_of, build_calibration, build_segments
from gradmap.model.loading import load_tokenizer
from tests.conftest import BOOLQ, BOS

# Of 128 x 128 tokens, seed 42, as they were before any sample began with a token of its own.
SMOLLM2_SAMPLES = "492f081a7a16ed1fed4140b612df081b7a1938dab9427ba2c481c14d5567947b"


@pytest.fixture
def tokenizer(picos):
    return load_tokenizer(picos["llama"].checkpoint.directory)


class CharacterTokenizer:
    """One token a character, so that nothing of a text can be lost or added unseen."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(character) for character in text]}


class WordTokenizer:
    """One token a word: its length."""

    def __call__(self, text, **_):
        return {"input_ids": [len(word) for word in text.split()]}


def test_the_seed_decides_the_samples(tokenizer, word_file):
    first, again, other = (
        build_calibration(tokenizer, f"file:{word_file}", samples=20, tokens=16, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.input_ids.shape == (20, 16)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.sha256 == again.sha256 != other.sha256


def test_samples_are_windows_of_different_documents(tokenizer, tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text("".join('{"text": "%s"}\n' % " ".join([f"w{word}"] * 64) for word in (5, 6)))  # noqa: UP031
    calibration = build_calibration(tokenizer, f"file:{path}", samples=2, tokens=8, seed=0)
    assert sorted(calibration.input_ids[:, 0].tolist()) == [5, 6]


def test_samples_are_from_anywhere_in_their_documents(tokenizer, tmp_path):
    """Documents begin alike, as articles do: titles, and what they are about."""
    path = tmp_path / "numbered.jsonl"
    words = " ".join(f"w{place}" for place in range(3, 67))
    # none is repeated
    path.write_text("".join(f'{{"text": "{words} w{last}"}}\n' for last in range(100, 140)))
    calibration = build_calibration(tokenizer, f"file:{path}", samples=40, tokens=16, seed=0)
    # one of four windows each; that none of 40 is a given one has a chance of 1e-5
    assert set(calibration.input_ids[:, 0].tolist()) == {3, 19, 35, 51}


def test_held_out_samples_are_not_fitted_on(tokenizer, word_file):
    calibration = build_calibration(tokenizer, f"file:{word_file}", samples=8, tokens=16, seed=0)
    assert (len(calibration.fit_ids), len(calibration.held_out_ids)) == (6, 2)
    assert torch.equal(
        torch.cat([calibration.fit_ids, calibration.held_out_ids]), calibration.input_ids
    )


def test_text_that_is_too_short_is_refused_with_the_count(tokenizer, word_file):
    with pytest.raises(UserError, match=r"120 windows of 20 tokens and 1000 are needed"):
        build_calibration(tokenizer, f"file:{word_file}", samples=1000, tokens=20, seed=0)


def test_a_sample_begins_with_bos_where_the_tokenizer_puts_one(pico_with_bos, word_file):
    tokenizer = load_tokenizer(pico_with_bos.directory)
    calibration = build_calibration(tokenizer, f"file:{word_file}", samples=20, tokens=16, seed=1)
    assert calibration.bos == BOS
    assert calibration.input_ids.shape == (20, 16)
    lines = [json.loads(line)["text"].split() for line in word_file.read_text().splitlines()]
    documents = [[int(word.removeprefix("w")) for word in words] for words in lines]
    windows = {tuple(words[start : start + 15]) for words in documents for start in (0, 15)}
    for first, *words in calibration.input_ids.tolist():
        assert first == BOS
        assert tuple(words) in windows


def test_a_tokenizer_without_bos_gives_the_samples_that_it_always_gave(
    tokenizer, word_file, smollm2
):
    assert bos_of(tokenizer) is None
    assert (
        build_calibration(tokenizer, f"file:{word_file}", samples=2, tokens=16, seed=0).bos is None
    )
    calibration = build_calibration(
        load_tokenizer(smollm2.directory), BOOLQ, samples=128, tokens=128, seed=42
    )
    assert (calibration.bos, calibration.sha256) == (None, SMOLLM2_SAMPLES)


@pytest.mark.parametrize(
    ("template", "bos"),
    [("<s> $A", BOS), ("</s> $A", 2), ("<s> $A </s>", BOS), ("$A </s>", None), ("$A", None)],
)
def test_what_stands_in_front_of_a_text_is_asked_of_the_tokenizer(tokenizer, template, bos):
    """Not of its `bos_token`, which these all have: OPT's puts </s> there, and many put nothing."""
    special = [("<s>", BOS), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=special
    )
    assert bos_of(tokenizer) == bos


def test_several_tokens_in_front_of_a_text_are_refused(tokenizer):
    processor = TemplateProcessing(single="<s> </s> $A", special_tokens=[("<s>", BOS), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = processor
    with pytest.raises(UserError, match="puts 2 tokens in front of a text"):
        bos_of(tokenizer)


def test_segments_are_consecutive_and_limited(tokenizer, word_file):
    everything = build_segments(tokenizer, f"file:{word_file}", tokens=32, limit=None)
    assert everything.shape == (60 * 40 // 32, 32)
    limited = build_segments(tokenizer, f"file:{word_file}", tokens=32, limit=3)
    assert torch.equal(limited, everything[:3])


def test_segments_are_the_rows_in_order_as_they_are_and_joined(tmp_path):
    rows = [" = A title = \n", "", "Twice.", "Twice.", "", "Last of all, \u00e4 \U0001f600 "]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    text = " = A title = \n\n\n\n\nTwice.\n\nTwice.\n\n\n\nLast of all, \u00e4 \U0001f600 "
    segments = build_segments(CharacterTokenizer(), f"file:{path}", tokens=5, limit=None)
    assert segments.flatten().tolist() == [
        ord(character) for character in text[: len(text) // 5 * 5]
    ]


# characters of a word; of the long ones more text must be read
@pytest.mark.parametrize("longest", [3, 40])
def test_the_first_segments_of_a_long_text_are_those_of_the_whole(tmp_path, longest):
    (tmp_path / "long.txt").write_text(
        " ".join("x" * (1 + index % longest) for index in range(5000))
    )
    source = f"file:{tmp_path}/long.txt"
    limited = build_segments(WordTokenizer(), source, tokens=16, limit=10)
    assert (
        limited.tolist()
        == torch.tensor([1 + index % longest for index in range(160)]).reshape(10, 16).tolist()
    )


def test_less_than_a_segment_is_refused(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("w5 w6 w7")
    with pytest.raises(UserError, match="less than one segment"):
        build_segments(tokenizer, f"file:{path}", tokens=32, limit=None)
