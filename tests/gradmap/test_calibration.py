"""Calibration samples and evaluation segments are reproducible, of the asked size, and never padded."""

import pytest
import torch

from gradmap.calibration import build_calibration, build_segments
from gradmap.checkpoint import load_tokenizer
from gradmap.errors import UserError


@pytest.fixture
def tokenizer(picos):
    return load_tokenizer(picos["llama"].checkpoint.directory)


def test_the_seed_decides_the_samples(tokenizer, word_file):
    first, again, other = (
        build_calibration(tokenizer, f"file:{word_file}", samples=20, tokens=16, seed=seed) for seed in (1, 1, 2)
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
    path.write_text("".join(f'{{"text": "{words} w{last}"}}\n' for last in range(100, 140)))  # none is repeated
    calibration = build_calibration(tokenizer, f"file:{path}", samples=40, tokens=16, seed=0)
    # one of four windows each; that none of 40 is a given one has a chance of 1e-5
    assert set(calibration.input_ids[:, 0].tolist()) == {3, 19, 35, 51}


def test_held_out_samples_are_not_fitted_on(tokenizer, word_file):
    calibration = build_calibration(tokenizer, f"file:{word_file}", samples=8, tokens=16, seed=0)
    assert (len(calibration.fit_ids), len(calibration.held_out_ids)) == (6, 2)
    assert torch.equal(torch.cat([calibration.fit_ids, calibration.held_out_ids]), calibration.input_ids)


def test_text_that_is_too_short_is_refused_with_the_count(tokenizer, word_file):
    with pytest.raises(UserError, match=r"120 windows of 20 tokens and 1000 are needed"):
        build_calibration(tokenizer, f"file:{word_file}", samples=1000, tokens=20, seed=0)


def test_segments_are_consecutive_and_limited(tokenizer, word_file):
    everything = build_segments(tokenizer, f"file:{word_file}", tokens=32, limit=None, seed=0)
    assert everything.shape == (60 * 40 // 32, 32)
    limited = build_segments(tokenizer, f"file:{word_file}", tokens=32, limit=3, seed=0)
    assert torch.equal(limited, everything[:3])


def test_less_than_a_segment_is_refused(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("w5 w6 w7")
    with pytest.raises(UserError, match="less than one segment"):
        build_segments(tokenizer, f"file:{path}", tokens=32, limit=None, seed=0)
