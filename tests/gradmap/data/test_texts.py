"""Every kind of text source gives the same documents; what cannot be read is refused."""

import gzip
import json
import sys

import datasets
import pytest
import typer

from gradmap.cli import run_app
from gradmap.common.errors import EXIT_BUG, EXIT_USAGE, UserError
from gradmap.data.text_specs import named_sources, source_files
from gradmap.data.texts import read_joined, read_texts

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
    (sources / "b.jsonl").write_text(
        '{"text": "b "}\n{"text": ""}\n{"text": "a"}\n{"text": "b "}\n'
    )
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
        ("disk:{0}/saved", "not understood"),
        ("disk:{0}/saved:", "not understood"),
        ("file:{0}/none.txt", "does not exist"),
        ("file:{0}/a.jsonl#missing", "line 1 has no field 'missing'"),
        ("disk:{0}/saved:missing", "no column 'missing'"),
        ("disk:{0}/hub:text", "save_to_disk"),
        ("file:{0}/hub/train.parquet#missing", "has no column 'missing'"),
    ],
)
def test_unusable_sources_are_refused(sources, spec, message):
    with pytest.raises(UserError, match=message):
        read_texts(spec.format(sources), seed=0)


def test_a_text_has_a_name_of_its_own_or_that_of_its_source():
    named = {"squad": "file:a.jsonl", "wikitext2": "wikitext2", "file:a=b.jsonl": "file:a=b.jsonl"}
    assert named_sources(["squad=file:a.jsonl", "wikitext2", "file:a=b.jsonl"]) == named


def test_a_path_may_begin_at_home_and_have_a_hash(sources, monkeypatch):
    folder = sources / "c#" / "b.txt#"
    folder.mkdir(parents=True)
    (sources / "a.jsonl").rename(folder / "a#.jsonl")
    (sources / "saved").rename(folder / "saved")
    monkeypatch.setenv("HOME", str(sources / "c#"))
    for spec in (
        "file:~/b.txt#/a#.jsonl",
        "file:~/b.txt#/a#.jsonl#doc.body",
        "disk:~/b.txt#/saved:passage",
    ):
        assert sorted(read_texts(spec, seed=0)) == DOCUMENTS
        assert source_files(spec)[0].is_relative_to(folder)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"doc": {"body": "a"}}, "doc.body"),
        ({"messages": [{"content": "a"}, {"content": "b"}]}, "messages.0.content"),
        ({"doc.body": "a"}, "doc.body"),
    ],
)
def test_a_nested_field_is_found_in_every_kind_of_source(tmp_path, row, field):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    table = datasets.Dataset.from_list([row])
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    for spec in (f"file:{tmp_path}/a.jsonl#{field}", f"file:{tmp_path}/hub/train.parquet#{field}"):
        assert read_texts(spec, seed=0) == ["a"]
    for spec in (f"disk:{tmp_path}/saved:{field}", f"hub:{tmp_path}/hub::train:{field}"):
        assert read_texts(spec, seed=0) == ["a"]


def test_blank_lines_and_a_byte_order_mark_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "a", "score": NaN}\r\n\n{"text": null}\n{"text": "b"}\n\n \n'
    )
    assert read_joined(f"file:{tmp_path}/a.jsonl") == "a\n\nb"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\n")
    assert read_joined(f"file:{tmp_path}/a.txt") == "a\n"


GZIP = gzip.compress(b'{"text": "first"}\n' * 1000)
BROKEN_TEXTS = {
    "latin-1.jsonl": ('{"text": "é"}'.encode("latin-1"), "line 1, is not text in UTF-8"),
    "late.jsonl": (
        '{"text": "a"}\n{"text": "é"}'.encode("latin-1") * 2,
        "line 2, is not text in UTF-8",
    ),
    "utf-16.jsonl": ('{"text": "a"}'.encode("utf-16"), "is in UTF-16; convert it to UTF-8"),
    "utf-16le.jsonl": ('{"text": "a"}'.encode("utf-16-le"), "line 1 is no JSON object"),
    "latin-1.txt": ("é".encode("latin-1"), "not text in UTF-8"),
    "utf-16.txt": ("a".encode("utf-16"), "is in UTF-16"),
    "utf-16le.txt": ("abc".encode("utf-16-le"), "zero bytes"),
    "zeros.txt": (b"\0" * 9, "zero bytes"),
    "empty.txt": (b"", "has no text"),
    "empty.jsonl": (b"", "has no text"),
    "blank.jsonl": (b"\n\n", "has no text"),
    "a.csv": (b"text\na\n", "unknown kind"),
    "a.zip": (b"PK\3\4", "unknown kind"),
    "list.jsonl": (b"[1]", "line 1 is no JSON object"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is no JSON object"),
    "cut.jsonl": (b'{"text": "a"}\n{"te', "line 2 is no JSON object"),
    "missing.jsonl": (b'{"text": "a"}\n\n{"body": "a"}', "line 3 has no field 'text'"),
    "number.jsonl": (
        b'{"text": "a"}\n{"text": 1}',
        "line 2: the field 'text' is a number, and no text",
    ),
    "object.jsonl": (b'{"text": {"a": 1}}', "the field 'text' is an object, and no text"),
    "surrogate.jsonl": (
        rb'{"text": "\ud800 a"}',
        "line 1: the field 'text' holds half of a character",
    ),
    "cut.jsonl.gz": (GZIP[:-12], "is no gzip archive, or is cut short or damaged"),
    "turned.jsonl.gz": (
        GZIP[:20] + b"\xff" * 9 + GZIP[29:],
        "is no gzip archive, or is cut short or damaged",
    ),
    "none.jsonl.gz": (b'{"text": "a"}', "is no gzip archive"),
    "zip.jsonl.gz": (b"PK\3\4", "is no gzip archive"),
    "gzip.jsonl": (GZIP, "line 1, is not text in UTF-8"),
    "a.parquet": (b"PAR1", "no parquet file, or is damaged"),
}


@pytest.mark.parametrize("name", BROKEN_TEXTS)
def test_a_broken_file_is_named(tmp_path, name):
    contents, problem = BROKEN_TEXTS[name]
    (tmp_path / name).write_bytes(contents)
    for read in (read_joined, lambda spec: read_texts(spec, seed=0)):
        with pytest.raises(UserError, match=f"{name}.*{problem}"):
            read(f"file:{tmp_path}/{name}")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_a_directory_in_place_of_a_file_is_named(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").mkdir()
    with pytest.raises(UserError, match=rf"a\.{suffix} is (a directory|no file)"):
        read_texts(f"file:{tmp_path}/a.{suffix}", seed=0)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("contents", [b"", b"[1]", b"\xff\0"])
def test_a_damaged_data_set_is_named(sources, name, contents):
    (sources / "saved" / name).write_bytes(contents)
    try:
        read_texts(f"disk:{sources}/saved:text", seed=0)
    except UserError as error:
        assert "saved is damaged" in str(error)


def test_the_splits_of_a_saved_data_set_are_named(sources):
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": ["a"]}) for name in ("train", "test")}
    )
    splits.save_to_disk(sources / "dict")
    with pytest.raises(
        UserError,
        match=r"dict holds the splits train, test; name one, as in disk:.*/dict/SPLIT:text",
    ):
        read_texts(f"disk:{sources}/dict:text", seed=0)
    assert read_texts(f"disk:{sources}/dict/test:text", seed=0) == ["a"]


def test_a_damaged_archive_is_wrong_input_and_no_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gradmap"])
    (tmp_path / "a.jsonl.gz").write_bytes(GZIP[:-12])
    app = typer.Typer()
    app.command()(lambda: read_texts(f"file:{tmp_path}/a.jsonl.gz", seed=0) and None)
    assert run_app(app) == EXIT_USAGE


def test_the_end_of_a_file_that_nobody_expected_is_a_bug(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gradmap"])
    app = typer.Typer()

    @app.command()
    def command():
        raise EOFError("of a file")

    assert run_app(app) == EXIT_BUG
    assert "EOFError: of a file" in capsys.readouterr().err
