"""The artifact directory: written beside its place, reloaded, compared, and only then put into place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from export import GGUF_FILE
from export.card import render_card
from export.comparison import Bounds, Comparison
from export.fold import count_parameters, require_foldable
from export.folded_model import hidden_size, stored_dtype
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
from export.verification import compare, require_faithful, run_artifact, run_artifact_in_each
from export.writers import (
    Source,
    Target,
    Writer,
    Written,
    find_gguf_converter,
    write_checkpoint,
    write_genai,
    write_gguf,
    write_onnx,
    write_vllm,
)
from gradmap.architectures import Architecture, architecture_of, layer_count
from gradmap.checkpoint import Checkpoint, load_tokenizer
from gradmap.console import announced, waiting
from gradmap.environment import describe_environment
from gradmap.errors import UserError
from gradmap.evaluation.result import read_evaluation
from gradmap.files import ARTIFACT_FILE, atomic_directory, refuse_foreign_directory, sha256_file, write_json, write_text
from gradmap.gguf_model import read_license
from gradmap.gguf_tokenizer import require_same_tokens
from gradmap.plan import PLAN_FILE, load_calibration_ids, load_changes, load_plan, require_same_model
from gradmap.precision import DTYPES
from gradmap.reading import read_json_object
from gradmap.vllm_environment import cpu_spoils_int8


@dataclass(frozen=True)
class Format:
    """One kind of artifact.

    dtypes: what its weights may be stored in, the default first. quantisations: likewise, besides none.
    runners: the programs (export.runners) that must reproduce the reference with it.
    """

    name: str
    write: Writer
    dtypes: tuple[str, ...]
    quantisations: tuple[str, ...]
    runners: tuple[str, ...]


_ANY_DTYPE = ("float32", "float16", "bfloat16", "float64")
FORMATS = {
    form.name: form
    for form in (
        Format("hf", write_checkpoint, ("keep", *_ANY_DTYPE), (), ("run_transformers",)),
        Format(
            "vllm",
            write_vllm,
            ("bfloat16", "float16", "float32", "keep"),
            ("int8",),
            ("run_transformers", "run_vllm"),
        ),
        Format("onnx", write_onnx, ("float32", "float16"), ("int8",), ("run_onnxruntime",)),
        Format("onnx-genai", write_genai, ("float32", "float16"), ("int8",), ("run_genai",)),
        Format("gguf", write_gguf, ("float16", "bfloat16", "float32"), ("int8",), ("run_transformers",)),
    )
}
# Of the most likely tokens of a quantised model, those that must be the reference's.
MIN_AGREEMENT = 0.9
# The package that a runner needs besides ours.
RUNTIME_PACKAGES = {"run_vllm": "vllm", "run_onnxruntime": "onnxruntime", "run_genai": "onnxruntime_genai"}


@dataclass(frozen=True)
class Verified:
    """What a received artifact is. files: how many were hashed. verification: by runtime."""

    name: str
    files: int
    verification: dict[str, Comparison]


@dataclass(frozen=True)
class ExportSettings:
    """What to export. dtype: None for each format's default. min_agreement: see Bounds.

    check_vllm: whether vLLM itself has to reproduce the reference (where it is installed).
    quality: evaluation results (the contents of eval.json) for the model card.
    """

    formats: Sequence[str]
    dtype: str | None = None
    quantise: str | None = None
    shard_bytes: int = 5 * 10**9
    min_agreement: float = MIN_AGREEMENT
    check_vllm: bool = True
    quality: dict[str, Any] = field(default_factory=dict)


def open_source(checkpoint: Checkpoint, plan_directory: Path | None) -> Source:
    """Loads a plan's parts and checks that they belong to the checkpoint. Raises UserError if not."""
    if plan_directory is None:
        vocabulary = int(checkpoint.config["vocab_size"])
        return Source(checkpoint, None, None, {}, random_probe(vocabulary))
    plan = load_plan(plan_directory)
    require_same_model(plan, checkpoint)
    probe_ids = load_calibration_ids(plan_directory, plan)[:PROBE_SAMPLES, :PROBE_TOKENS]
    changes = load_changes(plan_directory, plan)
    return Source(checkpoint, plan, sha256_file(plan_directory / PLAN_FILE), changes, probe_ids)


def export_artifacts(source: Source, settings: ExportSettings, out: Path) -> dict[str, ArtifactRecord]:
    """Writes and verifies `out`/FORMAT for every format; returns what each gradmap.json says, by format.

    Raises UserError on bad input or if an artifact does not reproduce the reference; then nothing of it is left.
    """
    targets = {name: choose_target(name, settings, source.checkpoint.config) for name in settings.formats}
    for name in targets:
        refuse_foreign_directory(out / name, ARTIFACT_FILE)
    require_foldable(source.checkpoint, architecture_of(source.checkpoint.config), source.changes)
    dtypes = {name: _reference_dtype(target, source.checkpoint) for name, target in targets.items()}
    with announced("Computing reference logits"):
        references = compute_references(
            source.checkpoint, source.removed, source.changes, source.probe_ids, set(dtypes.values())
        )
    return {
        name: _export_one(source, FORMATS[name], target, references[dtypes[name]], settings, out / name)
        for name, target in targets.items()
    }


def _reference_dtype(target: Target, checkpoint: Checkpoint) -> torch.dtype | None:
    """What an artifact's weights are rounded to when they are run in float32; None if each keeps a dtype of its own."""
    dtype = target.torch_dtype or stored_dtype(checkpoint)
    return torch.float32 if dtype == torch.float64 else dtype


def choose_target(name: str, settings: ExportSettings, config: dict[str, Any]) -> Target:
    """Settles how a format stores the weights of a model; raises UserError if it cannot store them so."""
    if name not in FORMATS:
        raise UserError(f"Unknown format {name!r}; known are {', '.join(FORMATS)}.")
    form = FORMATS[name]
    dtype = settings.dtype or form.dtypes[0]
    if dtype not in form.dtypes:
        raise UserError(f"Format {name} cannot store dtype {dtype!r}; it can store {', '.join(form.dtypes)}.")
    if settings.quantise is not None and settings.quantise not in form.quantisations:
        known = ", ".join(form.quantisations) or "none"
        raise UserError(f"Format {name} has no quantisation {settings.quantise!r}; it has: {known}.")
    packages = [RUNTIME_PACKAGES[runner] for runner in form.runners if runner in RUNTIME_PACKAGES]
    needed = [package for package in packages if package != "vllm"]
    if name == "vllm" and settings.quantise is not None:
        _require_quantisable(architecture_of(config))
        _require_checkable(settings)
        needed.append("compressed_tensors")
    for package in needed:
        if find_spec(package) is None:
            raise UserError(
                f"Format {name} needs the package {package}; install the extra gradmap[cpu] or gradmap[gpu]."
            )
    if name == "gguf":
        find_gguf_converter()
    return Target(dtype, settings.quantise, settings.shard_bytes)


def _require_checkable(settings: ExportSettings) -> None:
    if _asks_vllm(settings) and cpu_spoils_int8():
        raise UserError(
            "vLLM's 8-bit products overflow on this CPU, which has no VNNI, so that it cannot check an int8 artifact; "
            "export on one that has it, or leave the check by vLLM out (--no-check-vllm)."
        )


def _require_quantisable(architecture: Architecture) -> None:
    if architecture.transposed_linear:
        raise UserError(
            "The vllm format cannot quantise a model that stores its weights transposed (GPT-2); leave out --quantise."
        )
    if architecture.expert_down_projections is not None:
        raise UserError("The vllm format cannot quantise a mixture of experts; leave out --quantise.")


def read_quality(path: Path, source: Source) -> dict[str, Any]:
    """Reads what `gradmap eval` found about the model that is exported, with the length of its segments.

    Raises UserError if it evaluated another model, or as another version does.
    """
    evaluation = read_evaluation(path)
    same_plan = source.plan is None or evaluation.get("plan_sha256") == source.plan_hash
    if evaluation.get("model") != source.checkpoint.name or not same_plan:
        raise UserError(f"{path} evaluates another model or plan than the one that is exported; evaluate this one.")
    side: dict[str, Any] = evaluation["dense" if source.plan is None else "pruned"]
    return side | {"segment": evaluation["settings"]["segment"]}


def verify_directory(
    directory: Path, expected_sha256: str | None = None, min_agreement: float = MIN_AGREEMENT
) -> Verified:
    """Checks an artifact as it was received: every file's hash, and the logits of its stored probe.

    expected_sha256: of gradmap.json, where it is known from elsewhere. min_agreement: of a quantised artifact, whatever
    it was exported with. Raises UserError if a file is missing, changed, foreign, a program or a link to another place,
    or if the logits differ by more than the artifact's record or rounding allows.
    """
    record = read_record(directory, expected_sha256)
    require_files(directory, record.files)
    refuse_code(directory)
    form = FORMATS.get(record.format)
    if form is None:
        raise UserError(f"{directory} is of the unknown format {record.format!r}; known are {', '.join(FORMATS)}.")
    reference = load_probe(directory / PROBE_FILE)
    runner = form.runners[0]
    with announced(f"Running {directory} with {_label(runner)} in a fresh process"):
        outcome = run_artifact(runner, directory, reference)
    allowed = _widest_bounds(record, read_json_object(directory / "config.json"), min_agreement)
    recorded = record.verification.get(_label(runner))
    comparison = compare(reference, outcome, allowed if recorded is None else allowed.within(recorded.bounds))
    require_faithful(comparison)
    return Verified(record.name, len(record.files), {_label(runner): comparison})


def _widest_bounds(record: ArtifactRecord, config: dict[str, Any], min_agreement: float) -> Bounds:
    """What a received artifact may differ by at most, whatever its record allows."""
    if record.quantise is not None:
        return Bounds(min_agreement=min_agreement)
    dtype = DTYPES.get(record.dtype) or DTYPES.get(str(config.get("dtype")), torch.bfloat16)
    tolerance = logit_tolerance(layer_count(config), hidden_size(config), dtype, dtype)
    return Bounds(tolerance, stray_share=share_of_strays(dtype, dtype))


def _export_one(
    source: Source, form: Format, target: Target, reference: Reference, settings: ExportSettings, path: Path
) -> ArtifactRecord:
    with atomic_directory(path, marker=ARTIFACT_FILE) as partial:
        written = form.write(partial, source, target)
        if source.checkpoint.gguf_file is not None:
            _require_tokenizer(partial, source.checkpoint.gguf_file)
        save_probe(partial / PROBE_FILE, reference)
        runners = [runner for runner in form.runners if runner != "run_vllm" or _asks_vllm(settings)]
        fresh = "a fresh process" if len(runners) == 1 else "fresh processes"
        with announced(f"Verifying {path}: {' and '.join(map(_label, runners))} in {fresh}"):
            outcomes = run_artifact_in_each(runners, partial, reference, written.weight_bytes)
        comparisons = {}
        for runner, outcome in zip(runners, outcomes, strict=True):
            bounds = _bounds(source, target, written, reference, runner, settings.min_agreement)
            comparisons[runner] = compare(reference, outcome, bounds)
            require_faithful(comparisons[runner])
        record = _describe(source, form, target, written, comparisons)
        write_text(partial / "README.md", render_card(source.plan, record, settings.quality))
        hashes = written.hashes | _hash_missing(partial, written.hashes)
        record = record.model_copy(update={"files": hashes})
        write_json(partial / ARTIFACT_FILE, record.model_dump(mode="json"))
    return record


def _asks_vllm(settings: ExportSettings) -> bool:
    return settings.check_vllm and find_spec("vllm") is not None


def _require_tokenizer(directory: Path, gguf_file: Path) -> None:
    """Raises UserError unless the artifact's tokenizer is that of the GGUF file it comes from, and of the one it is."""
    tokenizer = load_tokenizer(directory)
    for described in (gguf_file, directory / GGUF_FILE):
        if described.exists():
            require_same_tokens(tokenizer, described)


def _bounds(
    source: Source, target: Target, written: Written, reference: Reference, runner: str, min_agreement: float
) -> Bounds:
    if target.quantise is not None:
        return Bounds(min_agreement=min_agreement)
    config = written.config
    dtypes = {tensor.spec.dtype for tensor in written.folded if tensor.spec.dtype.is_floating_point}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    served = DTYPES.get(str(config.get("dtype")), coarsest)
    compute = torch.float32 if runner == "run_transformers" else served
    stored = torch.float32 if reference.exact else coarsest
    tolerance = logit_tolerance(layer_count(config), hidden_size(config), compute, stored)
    return Bounds(tolerance, stray_share=share_of_strays(compute, stored))


def _label(runner: str) -> str:
    return runner.removeprefix("run_")


def _hash_missing(directory: Path, known: dict[str, str]) -> dict[str, str]:
    with waiting("Hashing what was written"):
        return {name: sha256_file(directory / name) for name in sorted(list_files(directory) - known.keys())}


def _describe(
    source: Source, form: Format, target: Target, written: Written, comparisons: dict[str, Comparison]
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
        verification={_label(runner): comparison for runner, comparison in comparisons.items()},
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
