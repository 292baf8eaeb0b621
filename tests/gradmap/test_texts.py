"""Every kind of text source gives the same documents; what cannot be read is refused."""

import gzip
import json

import datasets
import pytest

from gradmap.errors import UserError
from gradmap.texts import read_texts

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
