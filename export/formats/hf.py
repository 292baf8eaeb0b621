"""A stock Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from export.formats.format import ANY_DTYPE, Format

if TYPE_CHECKING:
    from export.writers import Source, Storage, Written


def write_hf(directory: Path, source: Source, storage: Storage) -> Written:
    """Layers dropped, W' folded, the tokenizer and the rest copied."""
    from export.writers import write_checkpoint

    return write_checkpoint(directory, source, storage)


HF = Format(
    name="hf",
    use="A stock checkpoint: `AutoModelForCausalLM.from_pretrained(DIRECTORY)`.",
    library="transformers",
    write=write_hf,
    dtypes=("keep", *ANY_DTYPE),
    served=True,
)
