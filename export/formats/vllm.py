"""A stock checkpoint that vLLM serves as it is told in it, with weights of eight bits if asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.formats.format import TRANSFORMERS, Format, Runner
from gradmap.common.errors import UserError

if TYPE_CHECKING:
    from export.writers import Source, Storage, Written

# vLLM's CPU build, started without compiling, and asked once: SmolLM2 on two cores of an EPYC, what
# is left of the 80 s of an export in vLLM's format (benchmarks.end_to_end) without the rest.
VLLM_RUNNER = Runner("vllm", package="vllm", optional=True, least_s=50.0)


def write_vllm(directory: Path, source: Source, storage: Storage) -> Written:
    """A checkpoint, with vllm.yaml for `vllm serve DIRECTORY --config DIRECTORY/vllm.yaml`."""
    from export.vllm_file import write_vllm_file
    from export.writers import write_checkpoint

    written = write_checkpoint(directory, source, storage, storage.quantise)
    dtype = "auto" if storage.dtype == "keep" else storage.dtype
    write_vllm_file(directory, source.served_name, dtype)
    return written


def require_quantisable(
    config: dict[str, Any], quantise: str | None, runners: Sequence[Runner]
) -> None:
    """Raises UserError if a model cannot be quantised, or the artifact not be checked here."""
    from gradmap.model.architectures import architecture_of
    from gradmap.runtimes.vllm_environment import cpu_spoils_int8

    if quantise is None:
        return
    architecture = architecture_of(config)
    if architecture.transposed_linear:
        raise UserError(
            "The vllm format cannot quantise a model that stores its weights transposed (GPT-2); "
            "leave out --quantise."
        )
    if architecture.expert_down_projections is not None:
        raise UserError(
            "The vllm format cannot quantise a mixture of experts; leave out --quantise."
        )
    if quantise == "int8" and VLLM_RUNNER in runners and cpu_spoils_int8():
        raise UserError(
            "vLLM's 8-bit products overflow on this CPU, which has no VNNI, so that it cannot "
            "check an int8 artifact; export on one that has it, or leave the check by vLLM out "
            "(--no-check-vllm)."
        )
    VLLM.require_package("compressed_tensors")


VLLM = Format(
    name="vllm",
    use=(
        "A stock checkpoint, ready to be served: `vllm serve DIRECTORY --config "
        "DIRECTORY/vllm.yaml`."
    ),
    library="transformers",
    write=write_vllm,
    dtypes=("bfloat16", "float16", "float32", "keep"),
    quantisations=("int8", "fp8"),
    runners=(TRANSFORMERS, VLLM_RUNNER),
    served=True,
    require=require_quantisable,
)
