"""Which files of a model's directory are its own: what is read, copied, hashed or uploaded of it,
and nothing else.

A directory from outside may hold links to anything of this machine, and file names that lead out of
it.
"""

from __future__ import annotations

import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from gradmap.common.errors import UserError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# All of a model but its weights that transformers reads, or that its users need.
COMPANION_PATTERNS = (
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
)
# In configs: which classes of the model's author are to be used. Stock models need none.
CODE_KEY = "auto_map"
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")


def plain_name(name: str) -> str:
    """Returns a file's name as it stands inside a file of a model: relative, below the directory,
    in one spelling.

    Raises ValueError if it is not such a name.
    """
    path = PurePosixPath(name)
    leads_out = path.is_absolute() or ".." in path.parts
    if not path.parts or leads_out or str(path) != name or _CONTROL_CHARACTER.search(name):
        raise ValueError(f"{name!r} is no plain name of a file inside the directory")
    return name


PlainName = Annotated[str, AfterValidator(plain_name)]


def own_file(directory: Path, name: str) -> Path:
    """The path of a file of a model, which need not exist.

    Raises UserError if the name leads out of the directory, or if something stands there that is no
    regular file inside it. A link may lead to another file of the directory, or to where the hub's
    cache keeps the contents of its snapshots.
    """
    try:
        path = directory / plain_name(name)
    except ValueError as error:
        raise UserError(f"{directory} cannot be used: {error}; fetch the model again.") from None
    if path.is_symlink() or path.exists():
        _require_own(directory, path)
    return path


def own_files(directory: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a model that match any of the patterns, directories aside. Raises UserError as
    `own_file` does."""
    found = {path for pattern in patterns for path in directory.glob(pattern)}
    return [
        own_file(directory, str(path.relative_to(directory)))
        for path in sorted(found)
        if not path.is_dir()
    ]


def copy_files(directory: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copies the files of a model that match, under the names that they have in its directory."""
    for path in own_files(directory, patterns):
        copy = target / path.relative_to(directory)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _require_own(directory: Path, path: Path) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop of links
        raise UserError(
            f"{path} is a link that leads nowhere; put the file itself in its place."
        ) from None
    if not any(target.is_relative_to(allowed) for allowed in _allowed(directory)):
        raise UserError(
            f"{path} is a link out of the directory, to {target}, which is not followed: what it "
            "leads to may not be meant to be read or published; put the file itself in its place."
        )
    if not stat.S_ISREG(target.stat().st_mode):
        raise UserError(f"{path} is no regular file; remove it.")


def _allowed(directory: Path) -> tuple[Path, ...]:
    """The directory and, of a snapshot in the hub's cache (models--OWNER--NAME/snapshots/COMMIT),
    its blobs."""
    whole = directory.resolve()
    return (whole, whole.parent.parent / "blobs") if whole.parent.name == "snapshots" else (whole,)
