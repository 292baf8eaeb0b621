"""Samples to train on: by weight, always the same, and apart from those that are held out."""

import json
from itertools import islice, pairwise

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.data.mixture import Mixture, in_proportion
from gradmap.model.loading import load_tokenizer
from tests.conftest import BOS

EOS, TOKENS = 2, 10
# Texts of words that the other does not have.
FIRST, SECOND = range(3, 80), range(80, 190)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture")
    made = []
    for name, words in (("first", FIRST), ("second", SECOND)):
        rows = [
            " ".join(
                f"w{words[(start * 5 + place) % len(words)]}" for place in range(7 + start % 8)
            )
            for start in range(len(words))
        ]
        path = directory / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
        made.append(f"file:{path}")
    return tuple(made)


@pytest.fixture(scope="module")
def tokenizers(picos, pico_with_bos):
    return {
        None: load_tokenizer(picos["llama"].directory),
        BOS: load_tokenizer(pico_with_bos.directory),
    }


def mixture(texts, held_out=6, seed=0):
    return Mixture(texts, (3.0, 1.0), TOKENS, held_out, seed)


def documents_of(stream):
    return {tuple(int(word[1:]) for word in text.split()) for text in stream.documents.source}


def pieces(sample, bos):
    """What lies between the ends of documents."""
    text = sample[1:] if bos is not None else sample
    ends = [-1, *(place for place, token in enumerate(text) if token == EOS), len(text)]
    found = [text[end + 1 : other] for end, other in pairwise(ends)]
    return [tuple(piece) for piece in found if piece]


@pytest.mark.parametrize("bos", [None, BOS])
def test_samples_are_pieces_of_the_documents_in_the_proportion_of_the_weights(
    texts, tokenizers, bos
):
    samples = mixture(texts).open(tokenizers[bos])
    drawn = samples.draw(40).tolist()
    known = set.union(*map(documents_of, samples.streams))
    for sample in drawn:
        assert len(sample) == TOKENS
        assert bos is None or sample[0] == bos
        for piece in pieces(sample, bos):
            assert any(
                piece == text[place : place + len(piece)]
                for text in known
                for place in range(len(text))
            )
    of_first = sum(pieces(sample, bos)[0][0] in FIRST for sample in drawn)
    assert of_first == 30


def test_no_document_that_is_held_out_is_trained_on(texts, tokenizers):
    samples = mixture(texts, held_out=8).open(tokenizers[None])
    assert samples.held_out.shape == (8, TOKENS)
    for stream in samples.streams:
        held_out = pieces([token for sample in stream.held_out for token in sample], None)
        whole = held_out[:-1]  # the last one is cut
        assert whole
        assert not documents_of(stream).intersection(whole)


@pytest.mark.parametrize("bos", [None, BOS])
def test_a_pass_has_every_document_and_each_another_order(texts, tokenizers, bos):
    samples = mixture(texts).open(tokenizers[bos])
    stream = samples.streams[0]
    in_pass = [list(stream.in_pass(number)) for number in range(2)]
    length = sum(len(document) + 1 for document in documents_of(stream))
    assert [len(samples) for samples in in_pass] == 2 * [length // stream.packing.text_tokens]
    assert in_pass[0] != in_pass[1]
    passing = stream.samples()
    expected = in_pass[0] + in_pass[1]
    assert list(islice(passing, len(expected))) == expected
    assert stream.passes == 2


def test_the_same_samples_come_whether_drawn_at_once_or_skipped(texts, tokenizers):
    whole, resumed = (mixture(texts).open(tokenizers[None]) for _ in range(2))
    expected = whole.draw(50)
    resumed.skip(20)
    assert torch.equal(resumed.draw(30), expected[20:])
    assert resumed.drawn == whole.drawn == 50
    other = mixture(texts, seed=1).open(tokenizers[None])
    other.draw(50)
    assert resumed.sha256 == whole.sha256 != other.sha256
    assert resumed.sha256_of_texts == whole.sha256_of_texts


def test_a_text_that_is_too_short_is_refused(texts, tokenizers):
    with pytest.raises(UserError, match=r"first.jsonl is too short: beside 450 samples of 10"):
        mixture(texts, held_out=600).open(tokenizers[None])


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (3.0, 1.0, 0.5), (0.2, 0.7, 0.1)])
def test_every_beginning_has_the_proportion_as_near_as_can_be(weights):
    drawn = [0] * len(weights)
    for number, place in enumerate(islice(in_proportion(weights), 200), start=1):
        drawn[place] += 1
        for count, weight in zip(drawn, weights, strict=True):
            assert abs(count - number * weight / sum(weights)) < len(weights)


def test_what_is_not_at_hand_is_left_out_and_the_rest_is_the_same(texts, tokenizers):
    """As where a plan is evaluated that was healed on what the dense model wrote."""
    written = [tuple(range(3, 12)) for _ in range(30)]
    mixing = Mixture(texts, (1.0, 1.0, 2.0), TOKENS, held_out=8, seed=0)
    whole, texts_alone = (mixing.open(tokenizers[None], given) for given in (written, None))
    drawn, known = whole.draw(40), texts_alone.draw(40)
    assert len(drawn) == 40 and len(known) == 20
    of_written = [row for row in drawn.tolist() if row not in known.tolist()]
    assert len(of_written) == 20
    assert of_written[0][:3] == [3, 4, 5] or EOS in of_written[0]
    assert whole.sha256 == texts_alone.sha256
    assert (len(whole.held_out), len(texts_alone.held_out)) == (8, 4)
    assert set(whole.passes) == {*texts, "--written"}
