"""An ONNX graph with ONNX Runtime's own fused operators and genai_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from export.formats.format import Format, Runner
from export.formats.onnx import FILES, MEMORY_FACTOR, require_memory

if TYPE_CHECKING:
    from export.writers import Source, Storage, Written

# What its builder calls them.
PRECISIONS = {"float32": "fp32", "float16": "fp16", "int8": "int8"}


def write_genai(directory: Path, source: Source, storage: Storage) -> Written:
    """A graph of onnxruntime-genai's builder, which runs in a process of its own."""
    import torch

    from export.verification import run_child
    from export.writers import write_through_checkpoint
    from gradmap.common.children import module_command
    from gradmap.common.console import announced

    precision = PRECISIONS[storage.quantise or storage.dtype]
    provider = "cuda" if torch.cuda.is_available() and storage.dtype == "float16" else "cpu"

    def convert(checkpoint: Path) -> None:
        require_memory(checkpoint)
        places = ["-m", str(checkpoint), "-o", str(directory), "-c", str(checkpoint / "cache")]
        command = module_command(
            "onnxruntime_genai.models.builder", *places, "-p", precision, "-e", provider
        )
        with announced("Building the onnxruntime-genai graph"):
            run_child(command, "onnxruntime-genai cannot build this model")

    return write_through_checkpoint(directory, source, storage, convert, FILES)


ONNX_GENAI = Format(
    name="onnx-genai",
    use="ONNX for onnxruntime-genai: `onnxruntime_genai.Model(DIRECTORY)`.",
    library="onnx",
    write=write_genai,
    dtypes=("float32", "float16"),
    quantisations=("int8",),
    runners=(Runner("genai", package="onnxruntime_genai"),),
    unfit_ropes=("dynamic",),
    memory_factor=MEMORY_FACTOR,
)
