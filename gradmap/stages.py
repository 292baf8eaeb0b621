"""Commands of ours as stages of a longer job: each in its own process, none repeated while its inputs stay the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from resource import struct_rusage
from typing import Any

from gradmap.console import say, waiting
from gradmap.errors import UserError
from gradmap.files import sha256_file, sha256_json, write_json
from gradmap.reading import read_json
from gradmap.verdict import EXIT_CODES

STAGES_DIRECTORY = ".stages"


@dataclass(frozen=True)
class Stage:
    """One `gradmap` command. inputs: files and directories it reads; output: what must exist when it is done.

    schema: the version in which `output` is written now; one of an older version is made again.
    verdicts: whether exit codes other than 0 are results of a gate and not failures.
    """

    name: str
    arguments: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path
    schema: int
    verdicts: bool = False


def stage_key(stage: Stage) -> str:
    """Hashes all that a stage's result depends on: its command, its inputs' bytes, our version and the output's."""
    inputs = {str(path): _hash_path(path) for path in stage.inputs}
    return sha256_json([version("gradmap"), stage.schema, stage.arguments, inputs])


def is_done(stage: Stage, out: Path) -> bool:
    """Whether it was done before, with the inputs that there are now."""
    # without a marker there is nothing to compare, and a model takes its time to hash
    return _marker(out, stage.name).exists() and _was_done_with(stage_key(stage), stage, out)


def run_stage(stage: Stage, label: str, out: Path, forced: bool) -> None:
    with waiting(f"{label} {stage.name}: hashing what it reads"):
        key = stage_key(stage)
    if not forced and _was_done_with(key, stage, out):
        say(f"{label} {stage.name}: done before, inputs unchanged")
        return
    marker = _marker(out, stage.name)
    say(f"{label} {stage.name}")
    started = time.monotonic()
    marker.unlink(missing_ok=True)
    code, usage = run_process([sys.executable, "-m", "gradmap", *stage.arguments])
    accepted = set(EXIT_CODES.values()) if stage.verdicts else {0}
    if code not in accepted or not stage.output.exists():
        raise UserError(f"Stage {stage.name} failed with exit code {code}; mend it and run again to go on from there.")
    write_json(marker, {"key": key, "seconds": round(time.monotonic() - started, 1), "peak_bytes": peak_bytes(usage)})


def stage_record(out: Path, stage_name: str) -> dict[str, Any]:
    """How long the stage took when it last ran (`seconds`), and its process's peak resident memory (`peak_bytes`)."""
    record: dict[str, Any] = read_json(_marker(out, stage_name))
    return record


def run_process(command: Sequence[str], **options: Any) -> tuple[int, struct_rusage]:
    """Exit code and use of resources of one process; it ends where we do. options: of subprocess.Popen."""
    process = subprocess.Popen(command, **options)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage


def peak_bytes(usage: struct_rusage) -> int:
    """Peak resident memory."""
    return usage.ru_maxrss * 1024


def _was_done_with(key: str, stage: Stage, out: Path) -> bool:
    marker = _marker(out, stage.name)
    return stage.output.exists() and marker.exists() and read_json(marker)["key"] == key


def _marker(out: Path, stage_name: str) -> Path:
    return out / STAGES_DIRECTORY / f"{stage_name}.json"


def _hash_path(path: Path) -> Any:
    """A file's SHA-256; of a directory, those of its files by name; None if there is nothing (a hub id)."""
    if path.is_dir():
        return {str(file.relative_to(path)): _hash_file(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return _hash_file(path) if path.is_file() else None


def _hash_file(path: Path) -> str:
    status = path.stat()
    return _hash_version(path, status.st_size, status.st_mtime_ns)


@cache  # a model is the input of every stage
def _hash_version(path: Path, size: int, modified_ns: int) -> str:
    return sha256_file(path)


def as_flags(values: dict[str, Any]) -> list[str]:
    """{"one_shot": True, "remove": 8, "limit": None, "x": [1, 2]} -> --one-shot --remove=8 --x=1 --x=2."""
    flags: list[str] = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [option] if value else []
        elif value is not None:
            each: Sequence[Any] = value if isinstance(value, list) else [value]
            flags += [f"{option}={one}" for one in each]
    return flags
