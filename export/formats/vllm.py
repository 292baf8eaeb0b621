"""A stock checkpoint that vLLM serves as it is told in it, with weights of few bits if asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.formats.format import CALIBRATED, TRANSFORMERS, Format, Runner
from gradmap.common.errors import UserError
from gradmap.common.wording import listed

if TYPE_CHECKING:
    from export.writers import Source, Storage, Written
    from gradmap.model.architectures import Architecture

# vLLM's CPU build, started without compiling, and asked once: SmolLM2 on two cores of an EPYC, what
# is left of the 80 s of an export in vLLM's format (benchmarks.end_to_end) without the rest.
VLLM_RUNNER = Runner("vllm", package="vllm", optional=True, least_s=50.0)
# Those whose activations are 8-bit integers too.
INTEGER_PRODUCTS = ("int8", "int8-gptq")
# Those that transformers reads of experts, which it stacks.
OF_EXPERTS = ("fp8", "w4a16")


def write_vllm(directory: Path, source: Source, storage: Storage) -> Written:
    """A checkpoint, with vllm.yaml for `vllm serve DIRECTORY --config DIRECTORY/vllm.yaml`."""
    from export.calibrated import write_calibrated
    from export.vllm_file import write_vllm_file
    from export.writers import write_checkpoint

    if storage.quantise in CALIBRATED:
        written = write_calibrated(directory, source, storage)
    else:
        written = write_checkpoint(directory, source, storage, storage.quantise)
    dtype = "auto" if storage.dtype == "keep" else storage.dtype
    write_vllm_file(directory, source.served_name, dtype)
    return written


def require_quantisable(
    config: dict[str, Any], quantise: str | None, runners: Sequence[Runner]
) -> None:
    """Raises UserError if a model cannot be quantised, or the artifact not be checked here."""
    from gradmap.model.architectures import architecture_of

    if quantise is None:
        return
    architecture = architecture_of(config)
    if architecture.transposed_linear:
        raise UserError(
            "The vllm format cannot quantise a model that stores its weights transposed (GPT-2); "
            "leave out --quantise."
        )
    if architecture.experts:
        _require_quantisable_experts(architecture, quantise)
    if VLLM_RUNNER in runners:
        _require_products(quantise, bool(architecture.experts))
    VLLM.require_package("compressed_tensors")
    if quantise in CALIBRATED:
        from export.calibrated import require_compressor

        require_compressor(config, quantise)


def _require_quantisable_experts(architecture: Architecture, quantise: str) -> None:
    """Raises UserError for experts that llm-compressor (0.14) or transformers (5) would misread."""
    if not architecture.experts_apart:
        raise UserError(
            "The vllm format cannot quantise a mixture of experts whose checkpoints store several "
            "experts in one tensor, or call them otherwise than transformers does (Mixtral); "
            "leave out --quantise."
        )
    if quantise not in OF_EXPERTS:
        raise UserError(
            f"The vllm format cannot quantise a mixture of experts to {quantise}, which "
            f"transformers does not read; use {listed(OF_EXPERTS, 'or')}."
        )


def _require_products(quantise: str, of_experts: bool) -> None:
    """Raises UserError if vLLM cannot compute with such weights on this CPU."""
    from gradmap.runtimes.vllm_environment import cpu_lacks_4_bits, cpu_spoils_int8, is_cpu_build

    problem = None
    if quantise in INTEGER_PRODUCTS and cpu_spoils_int8():
        problem = "vLLM's 8-bit products overflow on this CPU, which has no VNNI"
    if quantise == "w4a16" and cpu_lacks_4_bits():
        problem = "vLLM cannot multiply 4-bit weights on this CPU, which has no bfloat16"
    if of_experts and is_cpu_build():
        problem = "vLLM cannot multiply quantised experts on a CPU"
    if problem is not None:
        raise UserError(
            f"{problem}, so that it cannot check such an artifact; export where it can, or leave "
            "the check by vLLM out (--no-check-vllm)."
        )


VLLM = Format(
    name="vllm",
    use=(
        "A stock checkpoint, ready to be served: `vllm serve DIRECTORY --config "
        "DIRECTORY/vllm.yaml`."
    ),
    library="transformers",
    write=write_vllm,
    dtypes=("bfloat16", "float16", "float32", "keep"),
    quantisations=("int8", "int8-gptq", "fp8", "w4a16"),
    runners=(TRANSFORMERS, VLLM_RUNNER),
    served=True,
    require=require_quantisable,
)
