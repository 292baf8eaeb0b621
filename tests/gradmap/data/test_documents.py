"""Documents of a text that is larger than the buffer: not held, always the same, and apart from
those that are held out."""

import json
import random
from itertools import islice

import pytest

from gradmap.common.errors import UserError
from gradmap.data import documents
from gradmap.data.documents import Beginning, Text, shuffled
from gradmap.data.mixture import Mixture
from gradmap.data.texts import stripped_text_at
from gradmap.model.loading import load_tokenizer

COUNT, BUFFER = 200, 20


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(documents, "BUFFER_DOCUMENTS", BUFFER)


@pytest.fixture
def path(tmp_path):
    """Documents of three words each, and every tenth comes again at the end."""
    rows = [f"w{3 + n % 190} w{3 + n // 190} w{5 + n % 7}" for n in range(COUNT)]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in [*rows, *rows[::10]]))
    return path


def text(path, seed=0):
    return Text(f"file:{path}", seed, stripped_text_at)


@pytest.mark.parametrize("count", [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 7 * BUFFER + 3])
def test_all_come_once_and_no_more_are_held_than_the_buffer_has(small_buffer, count):
    read = []

    def source():
        for number in range(count):
            read.append(number)
            yield f"d{number}"

    given: list[str] = []
    for document in shuffled(source(), random.Random(1)):
        # what is given may still be held by whoever reads one ahead
        assert len(read) - len(given) <= BUFFER + 1
        given.append(document)
    assert sorted(given) == sorted(f"d{number}" for number in range(count))
    assert count < 2 or given != [f"d{number}" for number in range(count)]


def test_long_documents_fill_the_buffer_earlier(monkeypatch):
    monkeypatch.setattr(documents, "BUFFER_LENGTH", 100)
    source = iter(["x" * 30] * 9)
    assert len(documents.take_buffer(source)) == 4
    assert len(list(source)) == 5


def test_a_text_larger_than_the_buffer_is_read_again_in_every_pass(small_buffer, path):
    beginning = Beginning.read(text(path))
    held_out = {beginning.hold_out() for _ in range(5)}
    rest = beginning.rest()
    assert rest.source is beginning.more is not None
    for number in range(2):
        in_pass = list(rest.in_pass(number, random.Random(number)))
        assert len(in_pass) == COUNT - 5
        assert not held_out.intersection(in_pass)


def test_documents_that_come_again_are_known_up_to_a_limit(small_buffer, path, monkeypatch):
    assert len(list(text(path).read(0))) == COUNT
    monkeypatch.setattr(documents, "KNOWN_DOCUMENTS", 50)
    assert len(list(text(path).read(0))) == COUNT + 15


@pytest.fixture(scope="module")
def tokenizer(picos):
    return load_tokenizer(picos["llama"].directory)


def opened(path, tokenizer, seed=0):
    return Mixture((f"file:{path}",), (1.0,), tokens=8, held_out=4, seed=seed).open(tokenizer)


def test_the_same_samples_come_again_and_other_ones_with_another_seed(
    small_buffer, path, tokenizer
):
    first, again, other = (opened(path, tokenizer, seed) for seed in (0, 0, 1))
    in_pass = COUNT * 4 // 8 - 8
    drawn = first.draw(3 * in_pass)
    assert again.draw(3 * in_pass).equal(drawn)
    assert again.sha256_of_texts == first.sha256_of_texts
    assert not other.draw(3 * in_pass).equal(drawn)
    assert not drawn[:in_pass].equal(drawn[in_pass : 2 * in_pass])
    assert list(first.passes.values()) == [3]


def test_no_document_that_is_held_out_is_trained_on(small_buffer, path, tokenizer):
    samples = opened(path, tokenizer)
    held_out = tokenizer.decode(samples.held_out.flatten()).split("</s>")[:-1]
    trained = tokenizer.decode(samples.draw(2 * COUNT).flatten())
    documents_held_out = [" ".join(document.split()) for document in held_out]
    assert len(documents_held_out) >= 7
    trained_on = {" ".join(document.split()) for document in trained.split("</s>")}
    assert not trained_on.intersection(documents_held_out)


def test_a_buffer_that_has_room_for_all_changes_nothing(path, tokenizer, monkeypatch):
    whole = opened(path, tokenizer).draw(100)
    monkeypatch.setattr(documents, "BUFFER_DOCUMENTS", COUNT)
    assert opened(path, tokenizer).draw(100).equal(whole)


def test_another_text_has_another_hash(small_buffer, path, tokenizer):
    before = opened(path, tokenizer).sha256_of_texts
    contents = path.read_text()
    path.write_text(contents + '\n{"text": "w9"}')  # far behind what the buffer holds
    assert opened(path, tokenizer).sha256_of_texts != before
    path.write_text(contents.replace("w3", "w4", 1))
    assert opened(path, tokenizer).sha256_of_texts != before


def test_a_text_that_is_gone_in_a_later_pass_is_named(small_buffer, path, tokenizer):
    samples = opened(path, tokenizer)
    samples.draw(20)
    path.unlink()
    with pytest.raises(UserError, match=r"many\.jsonl does not exist"):
        samples.draw(COUNT)


def test_a_hub_data_set_is_streamed_to_its_end(small_buffer, tmp_path, monkeypatch):
    import datasets

    from gradmap.data import rows

    monkeypatch.setattr(rows, "HUB_DOCUMENTS", 10)
    (tmp_path / "hub").mkdir()
    table = datasets.Dataset.from_dict({"text": [f"t {number}" for number in range(COUNT)]})
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    source = Text(f"hub:{tmp_path}/hub", 0, stripped_text_at)
    assert sorted(source.read(0)) == sorted(table["text"])
    assert len(list(islice(source.read(1), 30))) == 30
