"""An ONNX graph of the standard's operators, named as optimum names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from export.formats.format import Format, Runner
from gradmap.common.errors import UserError

if TYPE_CHECKING:
    from export.writers import Source, Storage, Written

FILES = "*.onnx*"  # the graph, and the weights beside it
# Tracing holds the model, the graph's copy of its weights and the file being written.
MEMORY_FACTOR = 4
# torch's exporter: 65 s for SmolLM2's 22 layers on one core of an EPYC (benchmarks.onnx_export).
TRACING_S_PER_LAYER = 3.0


def write_onnx(directory: Path, source: Source, storage: Storage) -> Written:
    """A graph that torch traces in a process of its own; if quantised, it has ONNX Runtime's
    MatMulNBits."""
    from export.verification import run_child
    from export.writers import write_through_checkpoint
    from gradmap.common.children import module_command
    from gradmap.common.console import announced

    metadata = {
        "gradmap.name": source.served_name,
        "gradmap.plan_sha256": source.plan_hash or "none",
    }
    quantise = [storage.quantise] if storage.quantise else []

    def convert(checkpoint: Path) -> None:
        require_memory(checkpoint)
        arguments = [str(checkpoint), str(directory), json.dumps(metadata), *quantise]
        with announced("Tracing the ONNX graph"):
            run_child(
                module_command("export.onnx_export", *arguments),
                "The model cannot be exported to ONNX",
            )

    return write_through_checkpoint(directory, source, storage, convert, FILES)


def require_memory(checkpoint: Path) -> None:
    """Raises UserError unless a checkpoint's weights fit into the free memory MEMORY_FACTOR
    times."""
    weight_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    needed, available = MEMORY_FACTOR * weight_bytes, psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"Exporting this model to ONNX needs about {needed / 1e9:.0f} GB of memory, "
            f"{available / 1e9:.0f} GB are free; use a larger machine, or --dtype float16."
        )


ONNX = Format(
    name="onnx",
    use=(
        "ONNX with optimum's names: `ORTModelForCausalLM.from_pretrained(DIRECTORY)`, or any ONNX "
        "Runtime session."
    ),
    library="onnx",
    write=write_onnx,
    dtypes=("float32", "float16"),
    quantisations=("int8", "int4"),
    runners=(Runner("onnxruntime", package="onnxruntime"),),
    unfit_ropes=("dynamic", "longrope"),
    memory_factor=MEMORY_FACTOR,
    conversion_s_per_layer=TRACING_S_PER_LAYER,
)
