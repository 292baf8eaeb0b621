"""The artifact directory: written beside its place, reloaded, compared, and only then put into
place."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export import GGUF_FILE
from export.calibrated import require_samples
from export.card import render_card
from export.choices import choose_storage, runners_of
from export.comparison import MIN_AGREEMENT, LogitComparison
from export.far_positions import require_far_positions
from export.fold import count_parameters, require_foldable
from export.formats import FORMATS
from export.formats.format import CALIBRATED, Format
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
from export.judging import compare_in_each, reference_dtype, widest_bounds
from export.options import ExportOptions
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
from export.verification import compare, require_faithful, run_artifact
from export.writers import Source, Storage, Written, left_behind
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
from gradmap.model.architectures import architecture_of
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.configs import layer_count
from gradmap.model.gguf_model import read_license
from gradmap.model.gguf_tokenizer import require_same_tokens
from gradmap.model.loading import load_tokenizer
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
    verification: dict[str, LogitComparison]


def open_source(
    checkpoint: Checkpoint, plan_directory: Path | None, samples_of: Path | None = None
) -> Source:
    """Loads a plan's parts and checks that they belong to the checkpoint.

    samples_of: a plan of which a model without a plan has only the samples. Raises UserError if a
    plan is of another model.
    """
    if plan_directory is not None:
        if samples_of is not None:
            raise UserError("A plan's own samples are used with --plan; leave out --samples-of.")
        return _open_planned(checkpoint, plan_directory)
    if samples_of is not None:
        return replace(_open_planned(checkpoint, samples_of), plan=None, plan_hash=None, changes={})
    probe_ids = random_probe(int(checkpoint.config["vocab_size"]))
    return Source(checkpoint, None, None, {}, probe_ids[:, : checkpoint.positions])


def _open_planned(checkpoint: Checkpoint, directory: Path) -> Source:
    plan = load_plan(directory)
    require_same_model(plan, checkpoint)
    samples = load_calibration_ids(directory, plan)
    return Source(
        checkpoint,
        plan,
        sha256_file(directory / PLAN_FILE),
        load_changes(directory, plan),
        samples[:PROBE_SAMPLES, :PROBE_TOKENS],
        samples,
        plan.calibration,
    )


def export_artifacts(
    source: Source, options: ExportOptions, out: Path, quality: dict[str, Any] | None = None
) -> dict[str, ArtifactRecord]:
    """Writes and verifies `out`/FORMAT for every format; returns what each gradmap.json says, by
    format.

    quality: what `read_quality` returns, for the model card.
    Raises UserError on bad input or if an artifact does not reproduce the reference; then nothing
    of it is left.
    """
    config = source.checkpoint.config
    storages = {name: choose_storage(name, options, config) for name in options.formats}
    if options.quantise in CALIBRATED:
        require_samples(source)
    with ExitStack() as stack:
        for name in storages:
            stack.enter_context(output_directory(out / name, ARTIFACT_FILE))
        return _export_each(source, storages, options, out, quality or {})


def _export_each(
    source: Source,
    storages: Mapping[str, Storage],
    options: ExportOptions,
    out: Path,
    quality: dict[str, Any],
) -> dict[str, ArtifactRecord]:
    require_foldable(source.checkpoint, architecture_of(source.checkpoint.config), source.changes)
    dtypes = {
        name: reference_dtype(storage, source.checkpoint) for name, storage in storages.items()
    }
    left = left_behind(source.checkpoint)
    if left:
        say(
            f"Files of {source.checkpoint.name} that gradmap does not know stay behind: "
            f"{', '.join(left)}"
        )
    with announced("Computing reference logits"):
        references = compute_references(
            source.checkpoint,
            source.removed,
            source.changes,
            source.probe_ids if options.quantise is None else source.quantised_probe_ids,
            set(dtypes.values()),
        )
    return {
        name: _export_one(
            source,
            FORMATS[name],
            storage,
            references[dtypes[name]],
            options,
            out / name,
            quality,
        )
        for name, storage in storages.items()
    }


def read_quality(path: Path, source: Source) -> dict[str, Any]:
    """Reads what `gradmap eval` found about the model that is exported, with the length of its
    segments, and how each task was `asked`.

    Raises UserError if it evaluated another model, or as another version does.
    """
    evaluation = read_evaluation(path)
    same_plan = source.plan is None or evaluation.plan_sha256 == source.plan_hash
    if evaluation.model != source.checkpoint.name or not same_plan:
        raise UserError(
            f"{path} evaluates another model or plan than the one that is exported; evaluate this "
            "one."
        )
    side = evaluation.dense if source.plan is None else evaluation.pruned
    assert side is not None  # a plan's evaluation has two
    asked = {name: task.asked for name, task in evaluation.tasks.items()}
    described = {"segment": evaluation.settings.segment, "asked": asked}
    return side.model_dump(mode="json") | described


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
    if record.format not in FORMATS:
        raise UserError(
            f"{directory} is of the unknown format {record.format!r}; known are "
            f"{', '.join(FORMATS)}."
        )
    reference = load_probe(directory / PROBE_FILE)
    runner = FORMATS[record.format].runners[0]
    with announced(f"Running {directory} with {runner.name} in a fresh process"):
        outcome = run_artifact(runner, directory, reference)
    allowed = widest_bounds(record, read_json_object(directory / "config.json"), min_agreement)
    recorded = record.verification.get(runner.name)
    comparison = compare(
        reference, outcome, allowed if recorded is None else allowed.within(recorded.bounds)
    )
    require_faithful(comparison)
    return Verified(record.name, len(record.files), {runner.name: comparison})


def _export_one(
    source: Source,
    form: Format,
    storage: Storage,
    reference: Reference,
    options: ExportOptions,
    path: Path,
    quality: dict[str, Any],
) -> ArtifactRecord:
    runners = runners_of(form, options.check_vllm)
    require_far_positions(source, form, storage, runners)
    with atomic_directory(path, marker=ARTIFACT_FILE) as partial:
        written = form.write(partial, source, storage)
        if source.checkpoint.gguf_file is not None:
            _require_tokenizer(partial, source.checkpoint.gguf_file)
        save_probe(partial / PROBE_FILE, reference)
        fresh = "a fresh process" if len(runners) == 1 else "fresh processes"
        names = " and ".join(runner.name for runner in runners)
        with announced(f"Verifying {path}: {names} in {fresh}"):
            comparisons = compare_in_each(
                runners, partial, storage, written, reference, options.of_quantised
            )
        for comparison in comparisons.values():
            require_faithful(comparison)
        record = _describe(source, form, storage, written, comparisons)
        write_text(partial / "README.md", render_card(source.plan, record, quality))
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
    storage: Storage,
    written: Written,
    comparisons: dict[str, LogitComparison],
) -> ArtifactRecord:
    """gradmap.json without the files' hashes."""
    return ArtifactRecord(
        schema_version=SCHEMA_VERSION,
        name=source.served_name,
        format=form.name,
        dtype=storage.dtype,
        quantise=storage.quantise,
        calibration=source.calibration if written.calibrated else None,
        layers=layer_count(written.config),
        parameters=count_parameters(written.folded),
        weight_bytes=written.weight_bytes,
        base_model=_describe_base(source.checkpoint),
        plan=_describe_plan(source),
        verification=comparisons,
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
        calibration=source.plan.calibration,
        healing=source.plan.healing,
    )


def _describe_base(checkpoint: Checkpoint) -> BaseRecord:
    base_license = None if checkpoint.gguf_file is None else read_license(checkpoint.gguf_file)
    return BaseRecord(name=checkpoint.name, files=checkpoint.file_hashes, license=base_license)
