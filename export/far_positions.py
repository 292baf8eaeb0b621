"""Refuses a format that does not keep what a model's config says of positions far into a text (see
export.twin)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from export.comparison import Bounds
from export.formats.format import Format, Runner
from export.judging import compare_in_each, reference_dtype
from export.reference import compute_references
from export.twin import find_boundaries, probe_beyond, write_twin
from export.verification import find_problem
from export.writers import COPIED_PATTERNS, Source, Storage
from gradmap.common.console import announced
from gradmap.common.errors import UserError
from gradmap.model.configs import prune_config


def require_far_positions(
    source: Source, form: Format, storage: Storage, runners: Sequence[Runner]
) -> None:
    """Raises UserError if the format, or one of its runtimes, computes something else than the
    config says farther into a text than the probe is long. A twin of the model shows it, before the
    model itself is written."""
    config = prune_config(source.checkpoint.config, source.removed)
    far = {
        what: tokens
        for what, tokens in find_boundaries(config).items()
        if tokens >= source.probe_ids.shape[1]
    }
    if not far:
        return
    where = " and ".join(f"{what} ({tokens} tokens)" for what, tokens in far.items())
    reading = [runner for runner in runners if runner.far]
    with (
        announced(f"Checking on a small model that {form.name} keeps the {where}"),
        TemporaryDirectory() as directory,
    ):
        problem = _problem_of_twin(
            source, form, replace(storage, quantise=None), reading, Path(directory)
        )
    if problem is not None:
        raise UserError(
            f"Format {form.name} cannot be had of this model, because of its {where}: {problem}"
        )


def _problem_of_twin(
    source: Source, form: Format, storage: Storage, runners: Sequence[Runner], directory: Path
) -> str | None:
    twin = write_twin(source.checkpoint, source.removed, directory / "twin", COPIED_PATTERNS)
    small = Source(twin, None, None, {}, probe_beyond(twin.config))
    dtype = reference_dtype(storage, twin)
    reference = compute_references(twin, (), {}, small.probe_ids, {dtype})[dtype]
    artifact = directory / "artifact"
    artifact.mkdir()
    try:
        written = form.write(artifact, small, storage)
        comparisons = compare_in_each(runners, artifact, storage, written, reference, Bounds())
    except UserError as error:
        return str(error)
    for comparison in comparisons.values():
        problem = find_problem(comparison)
        if problem is not None:
            return f"in {comparison.runtime}, {problem}."
    return None
