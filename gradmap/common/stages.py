"""Commands of ours as stages of a longer job, each in its own process.

None is repeated while its inputs stay the same, and what it wrote is still there as it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from gradmap.common.children import module_command, peak_bytes, run_process
from gradmap.common.console import say, waiting
from gradmap.common.errors import (
    EXIT_BUG,
    EXIT_OUT_OF_MEMORY,
    OutOfMemoryError,
    StageError,
    UserError,
)
from gradmap.common.failures import MEMORY_CURE, require_not_killed
from gradmap.common.files import sha256_json, write_json
from gradmap.common.fingerprints import (
    Stamp,
    files_of,
    find_change,
    fingerprint,
    hash_path,
    is_remains,
)
from gradmap.common.reading import checked, read_json, read_json_object
from gradmap.common.verdict import EXIT_CODES

STAGES_DIRECTORY = ".stages"


@dataclass(frozen=True)
class Stage:
    """One `gradmap` command. inputs: files and directories it reads; outputs: those that it leaves
    when it is done.

    schema: the version in which the outputs are written now; what is of an older version is made
    again. verdicts: whether exit codes other than 0 are results of a gate and not failures.
    redrawn: files among the outputs that follow from the others and may be made anew, by another
    command too. facts: what those hold all the same that does not follow, as JSON; raises UserError
    where it cannot be read.
    """

    name: str
    arguments: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    schema: int
    verdicts: bool = False
    redrawn: tuple[Path, ...] = ()
    facts: Callable[[], Any] = dict


class _Marker(BaseModel):
    """What is kept of a stage that is done. outputs: the version of every file that it left, by its
    path below the directory.

    facts: their hash.
    """

    key: str
    seconds: float
    peak_bytes: int
    outputs: dict[str, Stamp]
    facts: str


def stage_key(stage: Stage) -> str:
    """Hashes all that a stage's result depends on: its command, its inputs' bytes, our version and
    the outputs'."""
    inputs = {str(path): hash_path(path) for path in stage.inputs}
    return sha256_json([version("gradmap"), stage.schema, stage.arguments, inputs])


def is_within(path: Path, outputs: Sequence[Path]) -> bool:
    """Whether a path is one of these outputs, or below one."""
    return any(path == output or output in path.parents for output in outputs)


def is_done(stage: Stage, out: Path) -> bool:
    """Whether a stage was done before, with the inputs that there are now, and left what there is
    now."""
    # without a marker there is nothing to compare, and a model takes its time to hash
    return (
        _marker(out, stage.name).exists() and _reason_to_run(stage_key(stage), stage, out) is None
    )


def run_stage(stage: Stage, label: str, out: Path, forced: bool) -> None:
    """Runs a stage, unless it is done and not `forced`. Raises OutOfMemoryError if it was killed,
    and StageError if it fails otherwise."""
    with waiting(f"{label} {stage.name}: hashing what it reads and what it wrote"):
        key = stage_key(stage)
        reason = _reason_to_run(key, stage, out)
    if not forced and reason is None:
        say(f"{label} {stage.name}: done before, inputs unchanged")
        return
    marker = _marker(out, stage.name)
    say(
        f"{label} {stage.name}: {reason}" if reason and marker.exists() else f"{label} {stage.name}"
    )
    _remove_remains(stage, out)
    marker.unlink(missing_ok=True)
    earlier = _versions(stage)
    started = time.monotonic()
    code, usage = run_process(module_command("gradmap", *stage.arguments))
    seconds = round(time.monotonic() - started, 1)
    _require_success(stage, code, earlier)
    with waiting(f"{label} {stage.name}: hashing what it wrote"):
        outputs, facts = fingerprint(stage.outputs, out), sha256_json(stage.facts())
    done = _Marker(
        key=key, seconds=seconds, peak_bytes=peak_bytes(usage), outputs=outputs, facts=facts
    )
    write_json(marker, done.model_dump())


def stage_record(out: Path, stage_name: str) -> dict[str, Any]:
    """How long the stage took when it last ran (`seconds`), and its process's peak resident memory
    (`peak_bytes`)."""
    return read_json_object(_marker(out, stage_name))


def _require_success(stage: Stage, code: int, earlier: set[tuple[int, int]]) -> None:
    """Raises what `run_stage` does. earlier: `_versions` before it ran."""
    if code == EXIT_OUT_OF_MEMORY:
        raise OutOfMemoryError(
            f"Stage {stage.name} ran out of memory; run again, and it goes on from there."
        )
    require_not_killed(code, f"Stage {stage.name}", f"{MEMORY_CURE}, and run again")
    # Python itself, where it cannot start us, exits as a gate that was missed
    is_verdict = stage.verdicts and code in EXIT_CODES.values() and not _versions(stage) <= earlier
    if (code == 0 or is_verdict) and all(path.exists() for path in stage.outputs):
        return
    raise StageError(
        f"Stage {stage.name} failed with exit code {code}; mend it and run again to go on from "
        "there.",
        EXIT_BUG if code < 0 or code in EXIT_CODES.values() else code,
    )


def _versions(stage: Stage) -> set[tuple[int, int]]:
    """The versions (inode, time) of the files that a stage leaves, as far as they are there."""
    statuses = [path.stat() for path in files_of(stage.outputs) if path.is_file()]
    return {(status.st_ino, status.st_mtime_ns) for status in statuses}


def _reason_to_run(key: str, stage: Stage, out: Path) -> str | None:
    """Why what is there is not this stage's result; None if it is."""
    record = _read_marker(stage, out)
    if record is None:
        return "it was not done before"
    if record.key != key:
        return "its inputs changed"
    if not all(path.exists() for path in stage.outputs):
        return "what it wrote is gone"
    measured = {
        name: stamp for name, stamp in record.outputs.items() if out / name not in stage.redrawn
    }
    return find_change(measured, out) or _change_of_facts(stage, record)


def _change_of_facts(stage: Stage, record: _Marker) -> str | None:
    try:
        return (
            None
            if sha256_json(stage.facts()) == record.facts
            else "the facts that it noted were changed"
        )
    except UserError as error:
        return str(error)


def _remove_remains(stage: Stage, out: Path) -> None:
    """Removes directories of which a part is gone: the stage's command would take the rest for
    somebody else's."""
    record = _read_marker(stage, out)
    if record is None:
        return
    for path in stage.outputs:
        if is_remains(path, record.outputs, out):
            shutil.rmtree(path)


def _read_marker(stage: Stage, out: Path) -> _Marker | None:
    """What is kept of the stage; None if nothing is, or it is of an older version or damaged."""
    try:
        return checked(_Marker, read_json(_marker(out, stage.name)), _marker(out, stage.name))
    except UserError:
        return None


def _marker(out: Path, stage_name: str) -> Path:
    return out / STAGES_DIRECTORY / f"{stage_name}.json"
