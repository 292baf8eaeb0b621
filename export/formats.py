"""The formats of artifacts: what each stores, what writes it, what has to run it, and how
exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from export.comparison import MIN_AGREEMENT, Bounds, Comparison
from export.folded_model import hidden_size, stored_dtype
from export.reference import Reference
from export.tolerance import logit_tolerance, share_of_strays
from export.twin import rope_types
from export.verification import compare, run_artifact_in_each
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
from gradmap.common.errors import UserError
from gradmap.model.architectures import Architecture, architecture_of, layer_count
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.precision import DTYPES
from gradmap.runtimes.vllm_environment import cpu_spoils_int8


@dataclass(frozen=True)
class Format:
    """One kind of artifact.

    dtypes: what its weights may be stored in, the default first. quantisations: likewise, besides
    none. runners: the programs (export.runners) that must reproduce the reference with it. far:
    whether they read from it what happens far into a text; transformers passes over a GGUF file's
    rope, which llama.cpp reads. unfit_ropes: the types that it cannot express.
    """

    name: str
    write: Writer
    dtypes: tuple[str, ...]
    quantisations: tuple[str, ...]
    runners: tuple[str, ...]
    far: bool = True
    unfit_ropes: tuple[str, ...] = ()


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
        Format(
            "onnx",
            write_onnx,
            ("float32", "float16"),
            ("int8",),
            ("run_onnxruntime",),
            unfit_ropes=("dynamic", "longrope"),
        ),
        Format(
            "onnx-genai",
            write_genai,
            ("float32", "float16"),
            ("int8",),
            ("run_genai",),
            unfit_ropes=("dynamic",),
        ),
        Format(
            "gguf",
            write_gguf,
            ("float16", "bfloat16", "float32"),
            ("int8",),
            ("run_transformers",),
            far=False,
            unfit_ropes=("dynamic",),
        ),
    )
}
# The package that a runner needs besides ours.
RUNTIME_PACKAGES = {
    "run_vllm": "vllm",
    "run_onnxruntime": "onnxruntime",
    "run_genai": "onnxruntime_genai",
}


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


def choose_target(name: str, settings: ExportSettings, config: dict[str, Any]) -> Target:
    """Settles how a format stores the weights of a model; raises UserError if it cannot store them
    so."""
    if name not in FORMATS:
        raise UserError(f"Unknown format {name!r}; known are {', '.join(FORMATS)}.")
    form = FORMATS[name]
    dtype = settings.dtype or form.dtypes[0]
    if dtype not in form.dtypes:
        raise UserError(
            f"Format {name} cannot store dtype {dtype!r}; it can store {', '.join(form.dtypes)}."
        )
    if settings.quantise is not None and settings.quantise not in form.quantisations:
        known = ", ".join(form.quantisations) or "none"
        raise UserError(
            f"Format {name} has no quantisation {settings.quantise!r}; it has: {known}."
        )
    for kind in sorted(rope_types(config) & set(form.unfit_ropes)):
        raise UserError(
            f"Format {name} cannot express a rope of type {kind}, whose frequencies follow the "
            "length of the text; use format hf or vllm."
        )
    packages = [RUNTIME_PACKAGES[runner] for runner in form.runners if runner in RUNTIME_PACKAGES]
    needed = [package for package in packages if package != "vllm"]
    if name == "vllm" and settings.quantise is not None:
        _require_quantisable(architecture_of(config))
        _require_checkable(settings)
        needed.append("compressed_tensors")
    for package in needed:
        if find_spec(package) is None:
            raise UserError(
                f"Format {name} needs the package {package}; install the extra gradmap[cpu] or "
                "gradmap[gpu]."
            )
    if name == "gguf":
        find_gguf_converter()
    return Target(dtype, settings.quantise, settings.shard_bytes)


def _require_checkable(settings: ExportSettings) -> None:
    if asks_vllm(settings) and cpu_spoils_int8():
        raise UserError(
            "vLLM's 8-bit products overflow on this CPU, which has no VNNI, so that it cannot "
            "check an int8 artifact; export on one that has it, or leave the check by vLLM out "
            "(--no-check-vllm)."
        )


def _require_quantisable(architecture: Architecture) -> None:
    if architecture.transposed_linear:
        raise UserError(
            "The vllm format cannot quantise a model that stores its weights transposed (GPT-2); "
            "leave out --quantise."
        )
    if architecture.expert_down_projections is not None:
        raise UserError(
            "The vllm format cannot quantise a mixture of experts; leave out --quantise."
        )


def reference_dtype(target: Target, checkpoint: Checkpoint) -> torch.dtype | None:
    """What an artifact's weights are rounded to when they are run in float32; None if each keeps a
    dtype of its own."""
    dtype = target.torch_dtype or stored_dtype(checkpoint)
    return torch.float32 if dtype == torch.float64 else dtype


def _bounds(
    source: Source,
    target: Target,
    written: Written,
    reference: Reference,
    runner: str,
    min_agreement: float,
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


def asks_vllm(settings: ExportSettings) -> bool:
    return settings.check_vllm and find_spec("vllm") is not None


def label_of(runner: str) -> str:
    return runner.removeprefix("run_")


def compare_in_each(
    runners: Sequence[str],
    directory: Path,
    source: Source,
    target: Target,
    written: Written,
    reference: Reference,
    min_agreement: float,
) -> dict[str, Comparison]:
    """Runs an artifact in each of its runners, and compares; `require_faithful` and `find_problem`
    judge."""
    outcomes = run_artifact_in_each(runners, directory, reference, written.weight_bytes)
    return {
        runner: compare(
            reference, outcome, _bounds(source, target, written, reference, runner, min_agreement)
        )
        for runner, outcome in zip(runners, outcomes, strict=True)
    }
