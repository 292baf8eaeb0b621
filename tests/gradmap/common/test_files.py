"""A result is whole or absent, and the earlier one survives a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gradmap.common import files
from gradmap.common.errors import UserError
from gradmap.common.files import atomic_directory, remove_file


def write_result(path, text):
    with atomic_directory(path, marker="result") as partial:
        (partial / "result").write_text(text)


def test_a_failure_leaves_the_earlier_result_and_no_debris(tmp_path):
    target = tmp_path / "out"
    write_result(target, "old")
    with pytest.raises(RuntimeError), atomic_directory(target, marker="result") as partial:
        (partial / "result").write_text("half")
        raise RuntimeError
    assert (target / "result").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write_result(target, "new")
    assert (target / "result").read_text() == "new"


def test_an_earlier_result_is_replaced_in_one_step(tmp_path, monkeypatch):
    target = tmp_path / "out"
    write_result(target, "old")
    # not by two renames, between which there would be nothing
    monkeypatch.setattr(Path, "rename", None)
    write_result(target, "new")
    assert (target / "result").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_an_exchange_of_names_it_is_replaced_too(tmp_path, monkeypatch):
    target = tmp_path / "out"
    write_result(target, "old")
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    write_result(target, "new")
    assert (target / "result").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_open_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "out", marker="marker") as partial:
            (partial / "marker").write_text("")
            save_file({"a": torch.zeros(1)}, partial / "hidden.safetensors")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {mode}


def test_foreign_files_are_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="will not be overwritten"):
        write_result(tmp_path, "new")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_what_a_killed_run_left_is_cleared_by_the_next(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from gradmap.common.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1]), marker='result') as partial:\n"
        "    (partial / 'result').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    target = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert killed.returncode == -9
    assert not target.exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    write_result(target, "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_of_a_file_goes_with_the_file(tmp_path):
    for name in ("journal", ".journal.lock", ".journal.partial-1", "other"):
        (tmp_path / name).write_text("")
    remove_file(tmp_path / "journal")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    (tmp_path / ".out.retired").mkdir()
    (tmp_path / ".out.retired" / "result").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out", marker="result"):
        raise RuntimeError
    assert (tmp_path / "out" / "result").read_text() == "old"


def test_debris_of_a_killed_process_with_our_own_number_is_removed(tmp_path):
    """Two containers in a row on one volume: both are process 1."""
    (tmp_path / f".result.partial-{os.getpid()}").mkdir()
    with atomic_directory(tmp_path / "result", marker="result") as partial:
        (partial / "result").write_text("whole")
    assert (tmp_path / "result" / "result").read_text() == "whole"
