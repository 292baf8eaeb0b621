"""The artifact directory: a stock Hugging Face checkpoint plus a model card and `gradmap.json`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from export import VLLM_CONFIG_FILE
from export.card import render_card
from export.fold import FoldedTensor, count_parameters, plan_fold, write_folded
from export.verification import (
    PROBE_SAMPLES,
    PROBE_TOKENS,
    Reference,
    Verification,
    compute_reference,
    logit_tolerance,
    random_probe,
    verify_artifact,
)
from gradmap.architectures import architecture_of, prune_config
from gradmap.checkpoint import DTYPES, Checkpoint
from gradmap.console import say
from gradmap.environment import describe_environment
from gradmap.errors import UserError
from gradmap.files import atomic_directory, refuse_foreign_directory, sha256_file, write_json, write_text
from gradmap.plan import PLAN_FILE, Plan, load_calibration_ids, load_corrections, load_plan, require_same_model

ARTIFACT_FILE = "gradmap.json"
# Everything else that a checkpoint's users need; weights, config and model card are written anew.
COPIED_PATTERNS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*.model",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class Format:
    """One kind of artifact. dtype: of its weights by default; None keeps the checkpoint's."""

    name: str
    dtype: str | None
    vllm_config: bool


FORMATS = {"hf": Format("hf", None, False), "vllm": Format("vllm", "bfloat16", True)}


@dataclass(frozen=True)
class Source:
    """What is exported: a checkpoint with a plan applied (or, without one, the dense model)."""

    checkpoint: Checkpoint
    plan: Plan | None
    plan_hash: str | None
    matrices: dict[int, Tensor]
    probe_ids: Tensor

    @property
    def removed(self) -> tuple[int, ...]:
        return () if self.plan is None else tuple(self.plan.removal_order)


def open_source(checkpoint: Checkpoint, plan_directory: Path | None) -> Source:
    """Loads a plan's parts and checks that they belong to the checkpoint. Raises UserError if not."""
    if plan_directory is None:
        vocabulary = int(checkpoint.config["vocab_size"])
        return Source(checkpoint, None, None, {}, random_probe(vocabulary))
    plan = load_plan(plan_directory)
    require_same_model(plan, checkpoint)
    probe_ids = load_calibration_ids(plan_directory, plan)[:PROBE_SAMPLES, :PROBE_TOKENS]
    matrices = load_corrections(plan_directory, plan)
    return Source(checkpoint, plan, sha256_file(plan_directory / PLAN_FILE), matrices, probe_ids)


def export_artifacts(
    source: Source, formats: Sequence[str], out: Path, dtype: str | None, shard_bytes: int
) -> dict[str, dict[str, Any]]:
    """Writes and verifies `out`/FORMAT for every format; returns their gradmap.json contents by format.

    dtype: overrides the formats' own; "keep" is the checkpoint's. Raises UserError on bad input or if an
    artifact does not reproduce the reference; then nothing of it is left behind.
    """
    chosen = [_find_format(name) for name in formats]
    if dtype is not None and dtype != "keep" and dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}; use keep, {', '.join(DTYPES)}.")
    for wanted in chosen:
        refuse_foreign_directory(out / wanted.name, ARTIFACT_FILE)
    say("Computing reference logits")
    reference = compute_reference(source.checkpoint, source.removed, source.matrices, source.probe_ids)
    return {wanted.name: _export_one(source, wanted, reference, out, dtype, shard_bytes) for wanted in chosen}


def _find_format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"Unknown format {name!r}; known are {', '.join(FORMATS)}.")
    return FORMATS[name]


def _export_one(
    source: Source, wanted: Format, reference: Reference, out: Path, dtype: str | None, shard_bytes: int
) -> dict[str, Any]:
    dtype_name = dtype or wanted.dtype or "keep"
    target_dtype = None if dtype_name == "keep" else DTYPES[dtype_name]
    architecture = architecture_of(source.checkpoint.config)
    folded = plan_fold(source.checkpoint, architecture, source.removed, source.matrices, target_dtype)
    config = artifact_config(source.checkpoint.config, source.removed, dtype_name)
    with atomic_directory(out / wanted.name, marker=ARTIFACT_FILE) as partial:
        hashes = write_folded(partial, folded, shard_bytes)
        write_json(partial / "config.json", config)
        _copy_companions(source.checkpoint.directory, partial)
        if wanted.vllm_config:
            _write_vllm_config(partial, source, dtype_name)
        say(f"Verifying {out / wanted.name} in a fresh process")
        layers = config[architecture.layer_count_key]
        widest_rounding = max((tensor.spec.dtype for tensor in folded), key=_rounding)
        tolerance = logit_tolerance(widest_rounding, layers, _hidden_size(config))
        verification = verify_artifact(partial, reference, tolerance)
        record = _describe(source, wanted, folded, layers, dtype_name, verification)
        write_text(partial / "README.md", render_card(source.plan, record))
        record["files"] = hashes | _hash_missing(partial, hashes)
        write_json(partial / ARTIFACT_FILE, record)
    return record


def artifact_config(config: dict[str, Any], removed: Sequence[int], dtype_name: str) -> dict[str, Any]:
    """Returns the config.json of an artifact: per-layer fields follow the removal, the dtype is what was written."""
    pruned = prune_config(config, removed)
    pruned.pop("_name_or_path", None)
    pruned.pop("_model_name_or_path", None)
    if dtype_name != "keep":
        pruned.pop("torch_dtype", None)
        pruned["dtype"] = dtype_name
    return pruned


def served_name(source: Source) -> str:
    """`SmolLM2-135M-Instruct-minus-8` for a model of which 8 layers were removed."""
    name = Path(source.checkpoint.name).name
    base = name.removesuffix(".gguf")
    return base if source.plan is None else f"{base}-minus-{len(source.plan.removal_order)}"


def _write_vllm_config(directory: Path, source: Source, dtype_name: str) -> None:
    settings = {"served-model-name": served_name(source), "dtype": "auto" if dtype_name == "keep" else dtype_name}
    header = f"# vllm serve DIRECTORY --config DIRECTORY/{VLLM_CONFIG_FILE}\n"
    write_text(directory / VLLM_CONFIG_FILE, header + yaml.safe_dump(settings, sort_keys=False))


def _copy_companions(source: Path, target: Path) -> None:
    for pattern in COPIED_PATTERNS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copy(path, target / path.name)


def _hash_missing(directory: Path, known: dict[str, str]) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(directory.iterdir()) if path.name not in known}


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _hidden_size(config: dict[str, Any]) -> int:
    return int(config.get("hidden_size") or config["n_embd"])


def _describe(
    source: Source,
    wanted: Format,
    folded: Sequence[FoldedTensor],
    layers: int,
    dtype_name: str,
    verification: Verification,
) -> dict[str, Any]:
    plan = source.plan
    return {
        "schema_version": 1,
        "name": served_name(source),
        "format": wanted.name,
        "dtype": dtype_name,
        "layers": layers,
        "parameters": count_parameters(folded),
        "weight_bytes": sum(tensor.spec.bytes for tensor in folded),
        "base_model": {"name": source.checkpoint.name, "files": source.checkpoint.file_hashes},
        "plan": None
        if plan is None
        else {
            "sha256": source.plan_hash,
            "removal_order": plan.removal_order,
            "corrected_layers": sorted(source.matrices),
            "calibration": plan.calibration.model_dump(),
        },
        "verification": asdict(verification),
        "environment": describe_environment(),
    }
