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
    checkpoint: Checkpoint,
    out: Path | str,
    *,
    plan: Path | str | None = None,
    samples_of: Path | str | None = None,
    **options: Any,
) -> dict[str, ArtifactRecord]:
    """Writes and verifies `out`/FORMAT for every format; without a plan, of the dense model.
    Returns what each gradmap.json says, by format.

    samples_of: a plan of the same model, on whose samples quantisation of the dense model is
    calibrated and judged. options: fields of export.options.ExportOptions, such as
    formats=["vllm"]. Raises UserError on bad input, or if an artifact does not compute what the
    plan says.
    """
    source = open_source(checkpoint, _path(plan), _path(samples_of))
    return export_artifacts(source, checked_options(ExportOptions, options), Path(out))


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)
