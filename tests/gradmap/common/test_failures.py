"""A full disk and want of memory are no bugs: one sentence, and an exit code of its own for what
may be tried again."""

import errno
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gradmap import cli
from gradmap.cli import run_app
from gradmap.common import failures, stages
from gradmap.common.errors import (
    EXIT_BUG,
    EXIT_OUT_OF_MEMORY,
    EXIT_TERMINATED,
    EXIT_USAGE,
    OutOfMemoryError,
    UserError,
)
from gradmap.common.failures import count_oom_kills, explain, is_out_of_memory
from gradmap.common.files import append_text, atomic_directory, atomic_file, write_json, write_text
from gradmap.common.stages import Stage, run_stage

SMALL, LARGE = 20_000, 100_000


@pytest.fixture
def full_disk():
    """Files end at a size: what a full disk does, but for the number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def by_torch(path):
    torch.save(torch.zeros(LARGE), path)


def by_safetensors(path):
    save_file({"a": torch.zeros(LARGE)}, path)


def by_yaml(path):
    with path.open("w") as file:
        yaml.safe_dump(list(range(LARGE)), file)


def by_parquet(path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": torch.rand(LARGE).tolist()}), path)


def by_us(path):
    write_text(path, "x" * LARGE)


def by_json(path):
    write_json(path, "x" * LARGE)


WRITERS = (by_torch, by_safetensors, by_yaml, by_parquet, by_us, by_json)


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_one_sentence_whoever_writes(tmp_path, capsys, full_disk, write):
    def command(**options):
        with atomic_directory(tmp_path / "out", marker="result") as partial:
            write(partial / "result")

    assert run_app(command) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "cannot be written: " in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", WRITERS)
def test_of_a_file_the_earlier_version_stays(tmp_path, full_disk, write):
    (tmp_path / "result").write_text("earlier")
    with pytest.raises(Exception), atomic_file(tmp_path / "result") as partial:  # noqa: B017 - each has its own
        write(partial)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_lines_are_appended_all_or_none(tmp_path, full_disk):
    append_text(tmp_path / "lines", "first\n")
    with pytest.raises(OSError):
        append_text(tmp_path / "lines", "x" * LARGE)
    append_text(tmp_path / "lines", "second\n")
    assert (tmp_path / "lines").read_text() == "first\nsecond\n"


def of_safetensors(number):
    return Exception(
        f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "", "/out/x"), "/out/x cannot be written: No space left on device."),
        (OSError(errno.EDQUOT, ""), "the output cannot be written: Disk quota exceeded."),
        (of_safetensors(errno.ENOSPC), "the output cannot be written: No space left on device."),
        (OSError(errno.EACCES, "", "/out/x"), "/out/x cannot be accessed: Permission denied."),
        (OSError(errno.ENOENT, "", "/out/x"), None),  # more likely a mistake of ours
        (of_safetensors(errno.ENOENT), None),
        (RuntimeError("a (os error) of ours"), None),
        (RuntimeError("PytorchStreamReader failed locating file"), None),
        (KeyError("a"), None),
    ],
)
def test_what_a_disk_is_at_fault_for_and_what_not(error, message):
    explained = explain(error)
    assert (str(explained) if explained else None) == message
    assert not isinstance(explained, OutOfMemoryError)


def test_a_failure_behind_another_is_found():
    try:
        try:
            raise OSError(errno.ENOSPC, "")
        except OSError as cause:
            raise RuntimeError("the library gives up") from cause
    except RuntimeError as error:
        assert "No space left" in str(explain(error))


OF_MEMORY = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."
    ),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
)


@pytest.mark.parametrize("error", OF_MEMORY)
def test_want_of_memory_has_an_exit_code_of_its_own(capsys, error):
    def command(**options):
        raise error

    assert is_out_of_memory(error)
    assert run_app(command) == EXIT_OUT_OF_MEMORY
    said = capsys.readouterr().err
    assert "Memory ran out" in said and "--stream" in said and said.count("\n") == 1


def test_a_bug_stays_a_bug(capsys):
    def command(**options):
        raise ZeroDivisionError("of ours")

    assert run_app(command) == EXIT_BUG
    assert "Traceback" in capsys.readouterr().err


def stage_ending(monkeypatch, tmp_path, code):
    monkeypatch.setattr(stages, "run_process", lambda command: (code, None))
    return Stage("prune", ("prune",), (), (tmp_path / "plan",), schema=1)


@pytest.mark.parametrize("code", [-signal.SIGKILL, 128 + signal.SIGKILL, EXIT_OUT_OF_MEMORY])
def test_a_stage_that_was_killed_for_memory_may_be_tried_again(monkeypatch, tmp_path, code):
    stage = stage_ending(monkeypatch, tmp_path, code)
    with pytest.raises(OutOfMemoryError, match=r"Stage prune .*memory.* run again"):
        run_stage(stage, "[1/1]", tmp_path, forced=False)


@pytest.mark.parametrize(
    ("code", "passed_on"),
    [
        (EXIT_USAGE, EXIT_USAGE),
        (EXIT_BUG, EXIT_BUG),
        (EXIT_TERMINATED, EXIT_TERMINATED),
        (0, EXIT_BUG),  # it left nothing
        (1, EXIT_BUG),  # no verdict: the stage has no gate
        (3, EXIT_BUG),
        (-signal.SIGSEGV, EXIT_BUG),
    ],
)
def test_a_stage_that_failed_otherwise_ends_the_run_as_it_ended(
    monkeypatch, tmp_path, capfd, code, passed_on
):
    stage = stage_ending(monkeypatch, tmp_path, code)
    assert run_app(lambda **options: run_stage(stage, "[1/1]", tmp_path, forced=False)) == passed_on
    assert f"Error: Stage prune failed with exit code {code}; mend it" in capfd.readouterr().err


def test_a_real_process_that_cannot_get_memory_ends_with_that_code():
    script = (
        "import resource, sys, torch; from gradmap.cli import run_app\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))\n"
        "sys.exit(run_app(lambda **options: torch.zeros(2**38)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert finished.returncode == EXIT_OUT_OF_MEMORY, finished.stderr


EVENTS = "low 0\nhigh 0\nmax 7\noom 3\noom_kill {}\noom_group_kill 0\n"


@pytest.fixture
def cgroup(tmp_path):
    """A control group below the root, and what says that this process is in it."""
    (tmp_path / "user" / "job").mkdir(parents=True)
    (tmp_path / "user" / "job" / "memory.events").write_text(EVENTS.format(2))
    (tmp_path / "memory.events").write_text(EVENTS.format(5))
    return tmp_path, tmp_path / "membership"


@pytest.mark.parametrize(
    ("membership", "kills"),
    [
        ("0::/user/job\n", 2),
        ("4:memory:/a\n0::/\n", 5),
        ("0::/gone\n", 0),
        ("4:memory:/a\n", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_kills_are_counted_in_the_control_group_of_this_process(cgroup, membership, kills):
    root, file = cgroup
    if membership is not None:
        file.write_text(membership)
    assert count_oom_kills(root, file) == kills


@pytest.fixture
def failing(monkeypatch):
    """Runs a command that fails, while as many processes were killed before and after it; returns
    its exit code."""

    def run(error, kills):
        counts = iter(kills)
        monkeypatch.setattr(failures, "count_oom_kills", lambda: next(counts))
        monkeypatch.setattr(cli, "count_oom_kills", lambda: next(counts))

        def fail(standalone_mode):
            raise error

        return run_app(fail)

    return run


@pytest.mark.parametrize(("kills", "code"), [([3, 4], EXIT_OUT_OF_MEMORY), ([3, 3], EXIT_USAGE)])
def test_a_failure_while_the_system_killed_for_memory_may_be_tried_again(
    failing, capsys, kills, code
):
    """As of a server whose engine was killed: it ends with a code of its own."""
    assert failing(UserError("vLLM ended with code 1."), kills) == code
    said = capsys.readouterr().err
    assert said.startswith("Error: vLLM ended with code 1.")
    assert ("Meanwhile the system has killed a process because memory ran out" in said) == (
        code == EXIT_OUT_OF_MEMORY
    )


@pytest.mark.parametrize(("kills", "code"), [([3, 4], EXIT_OUT_OF_MEMORY), ([3, 3], EXIT_BUG)])
def test_a_library_that_lost_a_process_to_want_of_memory_is_no_bug(failing, capsys, kills, code):
    assert failing(RuntimeError("EngineCore died"), kills) == code
    assert "EngineCore died" in capsys.readouterr().err
