"""What `gradmap export` does, as a function: the options are the command's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.artifact import export_artifacts, open_source
from export.integrity import ArtifactRecord
from export.options import ExportOptions
from gradmap.common.options import checked_options
from gradmap.model.checkpoint import Checkpoint


def export(
    checkpoint: Checkpoint, out: Path | str, *, plan: Path | str | None = None, **options: Any
) -> dict[str, ArtifactRecord]:
    """Writes and verifies `out`/FORMAT for every format; without a plan, of the dense model.
    Returns what each gradmap.json says, by format.

    options: fields of export.options.ExportOptions, such as formats=["vllm"]. Raises UserError on
    bad input, or if an artifact does not compute what the plan says.
    """
    source = open_source(checkpoint, None if plan is None else Path(plan))
    return export_artifacts(source, checked_options(ExportOptions, options), Path(out))
