"""Weights that are rounded by what calibration samples make of them: by llm-compressor, in an
environment of its own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from export.foreign import ForeignEnvironment
from export.quantisation import CONFIG_KEY, unquantised
from export.verification import run_child
from export.writers import (
    JUDGING_SAMPLES,
    Source,
    Storage,
    Written,
    write_through_checkpoint,
)
from gradmap.common.console import announced
from gradmap.common.errors import UserError
from gradmap.common.files import write_json
from gradmap.common.reading import read_json_object
from gradmap.model.architectures import architecture_of
from gradmap.model.small_model import build_model

COMPRESSOR = ForeignEnvironment(
    program="llmcompressor.trace",
    need="Calibrated quantisation needs llm-compressor",
    package="llmcompressor",
)


@dataclass(frozen=True)
class Scheme:
    """preset: what compressed-tensors calls it; of_experts: of a mixture of experts, of which
    transformers reads no zero points. grouped: whether some weights of a row share a scale, and not
    all."""

    preset: str
    of_experts: str | None = None
    grouped: bool = False


# By the name that --quantise has for it.
SCHEMES = {
    "int8-gptq": Scheme("INT8"),
    "w4a16": Scheme("W4A16_ASYM", of_experts="W4A16", grouped=True),
}
# How many weights of four bits may share a scale, the usual number first; vLLM knows all of these.
GROUP_SIZES = (128, 64, 32)


def write_calibrated(directory: Path, source: Source, storage: Storage) -> Written:
    """A checkpoint whose layers are quantised behind the fold, on the source's samples.

    Raises UserError if llm-compressor cannot do it.
    """
    assert storage.quantise is not None
    scheme = SCHEMES[storage.quantise]
    architecture = architecture_of(source.checkpoint.config)
    made = directory / ".quantised"
    request = {
        "out": str(made),
        "scheme": scheme.of_experts if architecture.experts else scheme.preset,
        "group_size": group_size(source.checkpoint.config) if scheme.grouped else None,
        "ignore": unquantised(architecture),
        "shard_bytes": storage.shard_bytes,
    }

    def quantise(checkpoint: Path) -> None:
        compress(checkpoint, source.fit_ids, request)
        for path in made.glob("*.safetensors*"):
            path.rename(directory / path.name)

    written = write_through_checkpoint(directory, source, storage, quantise, "*.safetensors")
    described = read_json_object(made / "config.json")[CONFIG_KEY]
    shutil.rmtree(made)
    # it names each map as transformers calls it, which of experts may not be as vLLM does
    described["ignore"] = request["ignore"]
    quantised = written.config | {CONFIG_KEY: described}
    write_json(directory / "config.json", quantised)
    return replace(written, config=quantised, calibrated=True)


def compress(checkpoint: Path, samples: Tensor, request: dict[str, Any]) -> None:
    """Has llm-compressor quantise a checkpoint on samples (N, T) of token ids."""
    request_file, samples_file = checkpoint / "request.json", checkpoint / "samples"
    save_file({"input_ids": samples.contiguous()}, samples_file)
    where = {"checkpoint": str(checkpoint), "samples": str(samples_file)}
    write_json(request_file, request | where)
    with announced(f"Quantising on {len(samples)} samples with llm-compressor"):
        run_child(
            COMPRESSOR.script_command("compress.py", str(request_file)),
            "llm-compressor cannot quantise this model",
        )


def require_samples(source: Source) -> None:
    """Raises UserError if there are none to calibrate on."""
    if source.samples is None:
        raise UserError(
            "Calibrated quantisation needs texts, and without a plan there are none; name a plan "
            "of this model whose samples it may use (--samples-of)."
        )
    if not len(source.fit_ids):
        raise UserError(
            f"Calibrated quantisation is judged on {JUDGING_SAMPLES} samples and calibrated on "
            f"others, and the plan has {len(source.samples)} in all; make one with more (gradmap "
            "prune --samples)."
        )


def require_compressor(config: dict[str, Any], quantise: str) -> None:
    """Raises UserError if llm-compressor is not there, or the model's maps fit no group."""
    COMPRESSOR.find()
    if SCHEMES[quantise].grouped:
        group_size(config)


def group_size(config: dict[str, Any]) -> int:
    """How many weights share a scale: the largest of GROUP_SIZES that divides the inputs of every
    linear map. Raises UserError if none does."""
    widths = input_widths(build_model(config, "meta"))
    for size in GROUP_SIZES:
        if gcd(*widths) % size == 0:
            return size
    raise UserError(
        "w4a16 gives every 32 weights of a row, or more, one scale, and this model's linear maps "
        f"have {', '.join(map(str, sorted(widths)))} inputs, not all of which 32 divides; use "
        "int8-gptq."
    )


def input_widths(model: nn.Module) -> set[int]:
    """How many inputs linear maps have, those of experts among them, which are stacked."""
    widths = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            widths.add(module.in_features)
        elif not isinstance(module, nn.Conv1d):
            own = module.parameters(recurse=False)
            widths |= {weight.shape[-1] for weight in own if weight.dim() == 3}
    return widths
