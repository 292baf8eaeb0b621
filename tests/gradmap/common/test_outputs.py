"""Where a result cannot be written, or somebody else writes it, a command says so before it
works."""

import fcntl
import json
import os
from contextlib import contextmanager

import pytest

from gradmap.common.errors import UserError
from gradmap.common.files import atomic_directory, write_text
from gradmap.common.locks import INNER_LOCK
from gradmap.common.outputs import output_directory, output_file, results_in
from tests.command_line import gradmap
from tests.gradmap.pruning.test_prune import prune_arguments

RECIPE = """model: {model}
prune: {{remove: 2, calibration: "file:{text}"}}
eval: {{perplexity: {{a: "file:{text}"}}}}
"""


@contextmanager
def held(lock):
    """As by another process."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"process": 7, "host": "pod-1", "since": "yesterday"}, file)
        file.flush()
        yield


@pytest.fixture
def commands(picos, word_file, tmp_path):
    """From a command's name to its arguments, without --out."""
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.format(model=picos["llama"].directory, text=word_file)
    )
    model = ("--model", picos["llama"].directory)
    text = ("--perplexity", f"a=file:{word_file}")
    return {
        "prune": prune_arguments(picos["llama"], word_file, "unused")[:-2],
        "eval": ("eval", *model, *text),
        "export": ("export", *model, "--format", "hf"),
        "compare": ("compare", *model, *text, "--methods", "random+none", "--remove", "1"),
        "run": ("run", tmp_path / "recipe.yaml"),
        "loadtest": ("loadtest", "--dense", "http://127.0.0.1:9", "--pruned", "http://127.0.0.1:9"),
    }


OUT = {"eval": "result.json"}
LOCKS = {"prune": ".result.lock", "eval": ".result.json.lock", "export": "result/.hf.lock"}
COMMANDS = ("prune", "eval", "export", "compare", "run", "loadtest")


def refusal(commands, command, out):
    finished = gradmap(*commands[command], "--out", out)
    assert finished.returncode == 2, finished.stderr
    return finished.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_who_writes_there_is_named(commands, command, tmp_path):
    with held(tmp_path / LOCKS.get(command, f"result/{INNER_LOCK}")):
        said = refusal(commands, command, tmp_path / OUT.get(command, "result"))
    assert (
        "is being written by process 7 on pod-1 since yesterday; wait until that has ended" in said
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_written_is_said_before_the_work(commands, command, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "is a file" in refusal(commands, command, tmp_path / "file" / OUT.get(command, "result"))
    said = refusal(commands, command, tmp_path / ("long" * 70))
    assert "the name is longer than" in said or "File name too long" in said
    assert (tmp_path / "file").read_text() == "precious"


KINDS = {
    "directory": lambda path: output_directory(path, "result"),
    "file": output_file,
    "results": lambda path: results_in(path, "result"),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("n" * 250, r"the name is longer than 215 bytes"),
        ("ü" * 120, r"the name is longer than 215 bytes"),
        ("n" * 300 + "/out", r"cannot be accessed: File name too long"),
        ("loop", r"symbolic link that leads back to itself"),
        ("file/out", r"file is a file, so that .*/file/out cannot be in it"),
        ("file/deeper/out", r"file is a file"),
        ("sealed/out", r"cannot be accessed: Permission denied|cannot be written: Read-only"),
    ],
)
def test_one_sentence_for_what_cannot_be_there(elsewhere, monkeypatch, kind, path, message):
    (elsewhere / "work" / "loop").symlink_to("loop")
    (elsewhere / "work" / "file").write_text("")
    if path.startswith("sealed"):
        monkeypatch.setattr(os, "open", _refuse)  # root may write everywhere
    with pytest.raises(UserError, match=message) as refused, KINDS[kind](elsewhere / "work" / path):
        pass
    assert str(refused.value).count("\n") == 0
    assert (elsewhere / "work" / "loop").is_symlink()


def _refuse(path, *arguments):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("path", [".", "..", "../work", "link"])
def test_the_working_directory_is_not_replaced(elsewhere, path):
    (elsewhere / "work" / "result").write_text("an earlier one")
    (elsewhere / "result").write_text("one here too")
    (elsewhere / "work" / "link").symlink_to(elsewhere / "work")
    with (
        pytest.raises(UserError, match="is the working directory"),
        output_directory(elsewhere / "work" / path, "result"),
    ):
        pass
    with (
        output_directory(elsewhere / "work" / "below", "result"),
        results_in(elsewhere / "work" / ".", "result"),
    ):
        pass  # what is in it may be, and results may be put into it


def test_a_directory_is_no_file_and_a_file_no_directory(elsewhere):
    (elsewhere / "file").write_text("precious")
    with (
        pytest.raises(UserError, match="is a directory; name a file"),
        output_file(elsewhere / "work"),
    ):
        pass
    for refuses in (output_directory, results_in):
        with (
            pytest.raises(UserError, match="is a file; name a directory"),
            refuses(elsewhere / "file", "result"),
        ):
            pass


def test_a_lock_that_a_killed_run_left_makes_no_directory_foreign(tmp_path):
    (tmp_path / INNER_LOCK).write_text("")
    with results_in(tmp_path, "result"):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(tmp_path, there):
    (tmp_path / "place").mkdir()
    target = tmp_path / "place" / "target"
    (link := tmp_path / "link").symlink_to(target)
    if there:
        target.mkdir()
        (target / "result").write_text("old")
    with output_directory(link, "result"), atomic_directory(link, marker="result") as partial:
        (partial / "result").write_text("new")
    assert link.is_symlink() and (target / "result").read_text() == "new"
    (file_link := tmp_path / "file-link").symlink_to(tmp_path / "place" / "file")
    with output_file(file_link):
        write_text(file_link, "text")
    assert file_link.is_symlink() and (tmp_path / "place" / "file").read_text() == "text"
    (into := tmp_path / "into").symlink_to(tmp_path / "place" / "results")
    with results_in(into, "result"):
        write_text(into / "result", "text")
    assert into.is_symlink() and (tmp_path / "place" / "results" / "result").read_text() == "text"
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == [
        "file",
        "results",
        "target",
    ]
