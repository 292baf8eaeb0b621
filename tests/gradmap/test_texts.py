"""Every kind of text source gives the same documents; what cannot be read is refused."""

import gzip
import json

import datasets
import pytest

from gradmap.errors import UserError
from gradmap.texts import read_joined, read_texts

DOCUMENTS = ["first", "second", "third"]


@pytest.fixture
def sources(tmp_path):
    lines = "".join(json.dumps({"doc": {"body": text}, "text": text}) + "\n" for text in DOCUMENTS)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    table = datasets.Dataset.from_dict({"text": DOCUMENTS, "passage": DOCUMENTS})
    (tmp_path / "hub").mkdir()
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    return tmp_path


@pytest.mark.parametrize(
    "spec",
    [
        "file:{0}/a.jsonl",
        "file:{0}/a.jsonl#doc.body",
        "file:{0}/a.jsonl.gz#text",
        "file:{0}/hub/train.parquet#passage",
        "disk:{0}/saved:passage",
        "hub:{0}/hub::train:passage",
    ],
)
def test_all_kinds_of_sources_give_the_documents(sources, spec):
    assert sorted(read_texts(spec.format(sources), seed=0)) == DOCUMENTS


def test_the_seed_decides_the_order(sources):
    spec = f"file:{sources}/a.jsonl"
    assert read_texts(spec, seed=5) == read_texts(spec, seed=5)
    assert len({tuple(read_texts(spec, seed=seed)) for seed in range(20)}) > 1


@pytest.fixture
def opened_splits(monkeypatch):
    """A hub whose splits have three rows each; the list of those that were opened."""
    opened = []

    def load_dataset(name, config, split, streaming):
        opened.append(split)
        rows = [f" {split} {row}\n" for row in range(3)]
        return datasets.Dataset.from_dict({"text": rows, "sentence": rows}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return opened


@pytest.mark.parametrize(
    ("preset", "calibration", "evaluation", "joined"),
    [
        ("wikitext2", "train", "test", " test 0\n\n\n test 1\n\n\n test 2\n"),
        ("ptb", "train", "validation", " validation 0\n\n\n validation 1\n\n\n validation 2\n"),
        ("c4", "train", "validation", " validation 0\n  validation 1\n  validation 2\n"),
        ("wikipedia", "train", "train", " train 0\n\n\n train 1\n\n\n train 2\n"),
    ],
)
def test_a_preset_is_evaluated_on_the_split_that_public_code_uses(
    opened_splits, preset, calibration, evaluation, joined
):
    assert sorted(read_texts(preset, seed=0)) == [f"{calibration} {row}" for row in range(3)]
    assert read_joined(preset) == joined
    assert opened_splits == [calibration, evaluation]


def test_rows_keep_their_order_and_their_repetitions(sources):
    (sources / "b.jsonl").write_text('{"text": "b "}\n{"text": ""}\n{"text": "a"}\n{"text": "b "}\n')
    assert read_joined(f"file:{sources}/b.jsonl") == "b \n\n\n\na\n\nb "
    assert sorted(read_texts(f"file:{sources}/b.jsonl", seed=0)) == ["a", "b"]


@pytest.mark.parametrize("read", [read_joined, lambda spec: read_texts(spec, seed=0)])
def test_a_source_without_text_is_refused(sources, read):
    (sources / "blank.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    with pytest.raises(UserError, match="has no text"):
        read(f"file:{sources}/blank.jsonl")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "not understood"),
        ("file:{0}/none.txt", "does not exist"),
        ("file:{0}/a.jsonl#missing", "line 1 is no JSON object with a field 'missing'"),
        ("disk:{0}/saved:missing", "no column 'missing'"),
        ("disk:{0}/hub:text", "save_to_disk"),
        ("file:{0}/hub/train.parquet#missing", "no parquet file with a column"),
    ],
)
def test_unusable_sources_are_refused(sources, spec, message):
    with pytest.raises(UserError, match=message):
        read_texts(spec.format(sources), seed=0)
