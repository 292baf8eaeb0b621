"""One process at a time writes a result; what a killed one left blocks nobody, in whatever
container it ran."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gradmap.common.errors import UserError
from gradmap.common.files import atomic_directory, write_text
from gradmap.common.locks import INNER_LOCK, writing, writing_into

HOLDER = """
import sys; from pathlib import Path; from gradmap.common.files import atomic_directory
with atomic_directory(Path(sys.argv[1]), marker="result") as partial:
    (partial / "result").write_text("half")
    print(partial.name, flush=True)
    sys.stdin.read()
"""
# As in another container: process numbers are its own, and the holder is number 1 or 2 in it.
IN_A_NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


def can_unshare():
    return (
        shutil.which("unshare")
        and subprocess.run([*IN_A_NAMESPACE, "true"], check=False).returncode == 0
    )


@pytest.fixture(params=["this container", "another container"])
def holder(request, tmp_path):
    """A process that is about to write `out`, and the name of its partial directory."""
    prefix = IN_A_NAMESPACE if request.param == "another container" else ()
    if prefix and not can_unshare():
        pytest.skip("no PID namespaces here")
    command = [*prefix, sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process, tmp_path / process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_who_writes_is_named_and_left_alone(holder, tmp_path):
    process, partial = holder
    signed = json.loads((tmp_path / ".out.lock").read_text())
    with pytest.raises(UserError) as refused, atomic_directory(tmp_path / "out", marker="result"):
        pass
    named = f"process {signed['process']} on {signed['host']} since {signed['since']}"
    assert f"{tmp_path / 'out'} is being written by {named}; wait" in str(refused.value)
    assert (partial / "result").read_text() == "half"
    process.communicate("")  # it ends as it should
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_a_killed_writer_left_blocks_nobody_and_is_removed(holder, tmp_path):
    process, partial = holder
    process.kill()
    process.wait()
    assert partial.exists() and (tmp_path / ".out.lock").exists()
    deadline = time.monotonic() + 60
    while not _is_free(tmp_path / ".out.lock"):  # the kernel ends its namespace
        assert time.monotonic() < deadline
    with atomic_directory(tmp_path / "out", marker="result") as mine:
        (mine / "result").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "result").read_text() == "whole"


def _is_free(lock):
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_two_names_of_one_place_are_one_lock(tmp_path, holder):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with (
        pytest.raises(UserError, match="link is being written by process"),
        writing(tmp_path / "link"),
    ):
        pass


def test_within_a_block_the_same_process_goes_on_writing(tmp_path):
    with writing(tmp_path / "out"):
        write_text(tmp_path / "out", "text")
        with writing(tmp_path / "out") as held:
            assert held
        assert not _is_free(tmp_path / ".out.lock")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_who_waits_goes_on_when_the_other_has_ended(tmp_path):
    script = (
        "import sys; from pathlib import Path; from gradmap.common.locks import writing\n"
        "with writing(Path(sys.argv[1]), wait=True): print(Path(sys.argv[1]).read_text())"
    )
    with writing(tmp_path / "out"):
        command = [sys.executable, "-c", script, str(tmp_path / "out")]
        waiter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while not _is_waited_for(tmp_path / ".out.lock"):
            assert waiter.poll() is None
        (tmp_path / "out").write_text("written first")
    assert waiter.communicate()[0] == "written first\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _is_waited_for(lock):
    """/proc/locks lists who waits with an arrow."""
    inode = f":{lock.stat().st_ino} "
    with open("/proc/locks") as table:  # noqa: PTH123 - no Path reads it shorter
        return any("->" in line and inode in line for line in table)


def test_a_directory_that_is_written_into_is_locked_inside(tmp_path):
    """So that two containers see the same lock where it is a volume of its own."""
    out = tmp_path / "run"
    with writing_into(out):
        assert [path.name for path in out.iterdir()] == [INNER_LOCK]
        (out / "result").write_text("")
    assert [path.name for path in out.iterdir()] == ["result"]


def test_a_directory_that_nothing_came_into_goes_again(tmp_path):
    with pytest.raises(RuntimeError), writing_into(tmp_path / "new"):
        raise RuntimeError
    (tmp_path / "old").mkdir()
    with writing_into(tmp_path / "old"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_it_warns_and_leaves_the_partials_of_others(
    tmp_path, monkeypatch, capsys, number
):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".out.partial-1").mkdir()
    with atomic_directory(tmp_path / "out", marker="result") as partial:
        (partial / "result").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-1", "out"]
    assert "has no locks" in capsys.readouterr().err


def test_a_lock_ends_with_its_holder_however_it_ends(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from gradmap.common.locks import writing\n"
        "with writing(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    with writing(tmp_path / "out"):
        signed = json.loads((tmp_path / ".out.lock").read_text())
        assert signed["process"] == os.getpid()
