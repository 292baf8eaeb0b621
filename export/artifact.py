"""The artifact directory: written beside its place, reloaded, compared, and only then put into
place."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export import GGUF_FILE
from export.card import render_card
from export.comparison import MIN_AGREEMENT, Bounds, Comparison
from export.far_positions import require_far_positions
from export.fold import count_parameters, require_foldable
from export.folded_model import hidden_size
from export.formats import (
    FORMATS,
    ExportSettings,
    Format,
    asks_vllm,
    choose_target,
    compare_in_each,
    label_of,
    reference_dtype,
)
from export.integrity import (
    SCHEMA_VERSION,
    ArtifactRecord,
    BaseRecord,
    PlanRecord,
    list_files,
    read_record,
    refuse_code,
    require_files,
)
from export.reference import (
    PROBE_FILE,
    PROBE_SAMPLES,
    PROBE_TOKENS,
    Reference,
    compute_references,
    load_probe,
    random_probe,
    save_probe,
)
from export.tolerance import logit_tolerance, share_of_strays
from export.verification import compare, require_faithful, run_artifact
from export.writers import Source, Target, Written, left_behind
from gradmap.common.console import announced, say, waiting
from gradmap.common.environment import describe_environment
from gradmap.common.errors import UserError
from gradmap.common.files import (
    ARTIFACT_FILE,
    atomic_directory,
    sha256_file,
    write_json,
    write_text,
)
from gradmap.common.outputs import output_directory
from gradmap.common.reading import read_json_object
from gradmap.evaluation.result import read_evaluation
from gradmap.model.architectures import architecture_of, layer_count
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.gguf_model import read_license
from gradmap.model.gguf_tokenizer import require_same_tokens
from gradmap.model.loading import load_tokenizer
from gradmap.model.precision import DTYPES
from gradmap.pruning.plan import (
    PLAN_FILE,
    load_calibration_ids,
    load_changes,
    load_plan,
    require_same_model,
)


@dataclass(frozen=True)
class Verified:
    """What a received artifact is. files: how many were hashed. verification: by runtime."""

    name: str
    files: int
    verification: dict[str, Comparison]


def open_source(checkpoint: Checkpoint, plan_directory: Path | None) -> Source:
    """Loads a plan's parts and checks that they belong to the checkpoint. Raises UserError if
    not."""
    if plan_directory is None:
        vocabulary = int(checkpoint.config["vocab_size"])
        return Source(
            checkpoint, None, None, {}, random_probe(vocabulary)[:, : checkpoint.positions]
        )
    plan = load_plan(plan_directory)
    require_same_model(plan, checkpoint)
    probe_ids = load_calibration_ids(plan_directory, plan)[:PROBE_SAMPLES, :PROBE_TOKENS]
    changes = load_changes(plan_directory, plan)
    return Source(checkpoint, plan, sha256_file(plan_directory / PLAN_FILE), changes, probe_ids)


def export_artifacts(
    source: Source, settings: ExportSettings, out: Path
) -> dict[str, ArtifactRecord]:
    """Writes and verifies `out`/FORMAT for every format; returns what each gradmap.json says, by
    format.

    Raises UserError on bad input or if an artifact does not reproduce the reference; then nothing
    of it is left.
    """
    targets = {
        name: choose_target(name, settings, source.checkpoint.config) for name in settings.formats
    }
    with ExitStack() as stack:
        for name in targets:
            stack.enter_context(output_directory(out / name, ARTIFACT_FILE))
        return _export_each(source, targets, settings, out)


def _export_each(
    source: Source, targets: Mapping[str, Target], settings: ExportSettings, out: Path
) -> dict[str, ArtifactRecord]:
    require_foldable(source.checkpoint, architecture_of(source.checkpoint.config), source.changes)
    dtypes = {name: reference_dtype(target, source.checkpoint) for name, target in targets.items()}
    if left := left_behind(source.checkpoint):
        say(
            f"Files of {source.checkpoint.name} that gradmap does not know stay behind: "
            f"{', '.join(left)}"
        )
    with announced("Computing reference logits"):
        references = compute_references(
            source.checkpoint,
            source.removed,
            source.changes,
            source.probe_ids,
            set(dtypes.values()),
        )
    return {
        name: _export_one(
            source, FORMATS[name], target, references[dtypes[name]], settings, out / name
        )
        for name, target in targets.items()
    }


def read_quality(path: Path, source: Source) -> dict[str, Any]:
    """Reads what `gradmap eval` found about the model that is exported, with the length of its
    segments.

    Raises UserError if it evaluated another model, or as another version does.
    """
    evaluation = read_evaluation(path)
    same_plan = source.plan is None or evaluation.get("plan_sha256") == source.plan_hash
    if evaluation.get("model") != source.checkpoint.name or not same_plan:
        raise UserError(
            f"{path} evaluates another model or plan than the one that is exported; evaluate this "
            "one."
        )
    side: dict[str, Any] = evaluation["dense" if source.plan is None else "pruned"]
    return side | {"segment": evaluation["settings"]["segment"]}


def verify_directory(
    directory: Path, expected_sha256: str | None = None, min_agreement: float = MIN_AGREEMENT
) -> Verified:
    """Checks an artifact as it was received: every file's hash, and the logits of its stored probe.

    expected_sha256: of gradmap.json, where it is known from elsewhere. min_agreement: of a
    quantised artifact, whatever it was exported with. Raises UserError if a file is missing,
    changed, foreign, a program or a link to another place, or if the logits differ by more than the
    artifact's record or rounding allows.
    """
    record = read_record(directory, expected_sha256)
    require_files(directory, record.files)
    refuse_code(directory)
    form = FORMATS.get(record.format)
    if form is None:
        raise UserError(
            f"{directory} is of the unknown format {record.format!r}; known are "
            f"{', '.join(FORMATS)}."
        )
    reference = load_probe(directory / PROBE_FILE)
    runner = form.runners[0]
    with announced(f"Running {directory} with {label_of(runner)} in a fresh process"):
        outcome = run_artifact(runner, directory, reference)
    allowed = _widest_bounds(record, read_json_object(directory / "config.json"), min_agreement)
    recorded = record.verification.get(label_of(runner))
    comparison = compare(
        reference, outcome, allowed if recorded is None else allowed.within(recorded.bounds)
    )
    require_faithful(comparison)
    return Verified(record.name, len(record.files), {label_of(runner): comparison})


def _widest_bounds(record: ArtifactRecord, config: dict[str, Any], min_agreement: float) -> Bounds:
    """What a received artifact may differ by at most, whatever its record allows."""
    if record.quantise is not None:
        return Bounds(min_agreement=min_agreement)
    dtype = DTYPES.get(record.dtype) or DTYPES.get(str(config.get("dtype")), torch.bfloat16)
    tolerance = logit_tolerance(layer_count(config), hidden_size(config), dtype, dtype)
    return Bounds(tolerance, stray_share=share_of_strays(dtype, dtype))


def _export_one(
    source: Source,
    form: Format,
    target: Target,
    reference: Reference,
    settings: ExportSettings,
    path: Path,
) -> ArtifactRecord:
    runners = [runner for runner in form.runners if runner != "run_vllm" or asks_vllm(settings)]
    require_far_positions(source, form, target, runners)
    with atomic_directory(path, marker=ARTIFACT_FILE) as partial:
        written = form.write(partial, source, target)
        if source.checkpoint.gguf_file is not None:
            _require_tokenizer(partial, source.checkpoint.gguf_file)
        save_probe(partial / PROBE_FILE, reference)
        fresh = "a fresh process" if len(runners) == 1 else "fresh processes"
        with announced(f"Verifying {path}: {' and '.join(map(label_of, runners))} in {fresh}"):
            comparisons = compare_in_each(
                runners, partial, source, target, written, reference, settings.min_agreement
            )
        for comparison in comparisons.values():
            require_faithful(comparison)
        record = _describe(source, form, target, written, comparisons)
        write_text(partial / "README.md", render_card(source.plan, record, settings.quality))
        hashes = written.hashes | _hash_missing(partial, written.hashes)
        record = record.model_copy(update={"files": hashes})
        write_json(partial / ARTIFACT_FILE, record.model_dump(mode="json"))
    return record


def _require_tokenizer(directory: Path, gguf_file: Path) -> None:
    """Raises UserError unless the artifact's tokenizer is that of the GGUF file it comes from, and
    of the one it is."""
    tokenizer = load_tokenizer(directory)
    for described in (gguf_file, directory / GGUF_FILE):
        if described.exists():
            require_same_tokens(tokenizer, described)


def _hash_missing(directory: Path, known: dict[str, str]) -> dict[str, str]:
    with waiting("Hashing what was written"):
        return {
            name: sha256_file(directory / name)
            for name in sorted(list_files(directory) - known.keys())
        }


def _describe(
    source: Source,
    form: Format,
    target: Target,
    written: Written,
    comparisons: dict[str, Comparison],
) -> ArtifactRecord:
    """gradmap.json without the files' hashes."""
    return ArtifactRecord(
        schema_version=SCHEMA_VERSION,
        name=source.served_name,
        format=form.name,
        dtype=target.dtype,
        quantise=target.quantise,
        layers=layer_count(written.config),
        parameters=count_parameters(written.folded),
        weight_bytes=written.weight_bytes,
        base_model=_describe_base(source.checkpoint),
        plan=_describe_plan(source),
        verification={label_of(runner): comparison for runner, comparison in comparisons.items()},
        environment=describe_environment(),
        files={},
    )


def _describe_plan(source: Source) -> PlanRecord | None:
    if source.plan is None or source.plan_hash is None:
        return None
    return PlanRecord(
        sha256=source.plan_hash,
        removal_order=source.plan.removal_order,
        corrected_layers=sorted({place.layer for place in source.changes}),
        calibration=source.plan.calibration.model_dump(),
    )


def _describe_base(checkpoint: Checkpoint) -> BaseRecord:
    base_license = None if checkpoint.gguf_file is None else read_license(checkpoint.gguf_file)
    return BaseRecord(name=checkpoint.name, files=checkpoint.file_hashes, license=base_license)
