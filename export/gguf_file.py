"""A checkpoint as a GGUF file: converted, and quantised by llama.cpp itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    Keys,
    get_tensor_name_map,
)
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from export.foreign import ForeignEnvironment
from export.runners.probe_io import placement_for
from export.verification import run_child
from gradmap.common.console import announced, progress
from gradmap.common.reading import read_json_object


def convert_to_gguf(
    llama_cpp: ForeignEnvironment, checkpoint: Path, file: Path, stored: str, name: str
) -> None:
    """Makes one file of a checkpoint, whatever its size. stored: what llama.cpp calls the dtype.
    Raises UserError if llama.cpp's converter cannot."""
    kinds = kinds_of_layers(read_json_object(checkpoint / "config.json"))
    converted = checkpoint / "converted.gguf" if kinds else file
    naming = ["--outfile", str(converted), "--model-name", name]
    command = [llama_cpp.find(), str(checkpoint), "--outtype", stored, *naming]
    with announced("Converting to GGUF"):
        run_child(command, "llama.cpp's converter cannot convert this model")
    if kinds:
        add_metadata(converted, file, kinds)
        converted.unlink()


def kinds_of_layers(config: Mapping[str, Any]) -> dict[str, MetadataDetails]:
    """Where some layers have a window: which, and their rope, by llama.cpp's keys without the
    architecture.

    Its converter leaves both to what is known of the family, which a pruned model's are not like.
    """
    windows = [kind == "sliding_attention" for kind in config.get("layer_types") or ()]
    if not any(windows) or all(windows):
        return {}
    named = {Keys.Attention.SLIDING_WINDOW_PATTERN: MetadataDetails(GGUFValueType.ARRAY, windows)}
    theta = config.get("rope_local_base_freq")
    if theta is not None:
        named[Keys.Rope.FREQ_BASE_SWA] = MetadataDetails(GGUFValueType.FLOAT32, float(theta))
    return named


def add_metadata(converted: Path, file: Path, added: Mapping[str, MetadataDetails]) -> None:
    """Copies a GGUF file, with more keys."""
    reader = GGUFReader(converted)
    architecture = _field(reader, Keys.General.ARCHITECTURE)
    named = {key.format(arch=architecture): value for key, value in added.items()}
    with announced("Naming the layers that have a window"):
        copy_with_new_metadata(reader, GGUFWriter(file, architecture), named, [])


def quantise_converted(
    llama_cpp: ForeignEnvironment, converted: Path, file: Path, kind: str, samples: Tensor
) -> None:
    """Has llama.cpp write a file in `kind`, such as q4_k_m, of one that was converted, beside the
    checkpoint that it was converted from. Raises UserError if it cannot.

    samples: (N, T), by which it may weigh the inputs of each map; none are needed.
    """
    command = llama_cpp.script_command("quantise_gguf.py", str(converted), str(file), kind)
    if len(samples):
        importances = importance_matrix(converted.parent, converted, samples)
        save_file(importances, converted.with_suffix(".importances"))
        command.append(str(converted.with_suffix(".importances")))
    with announced(f"Quantising to {kind} with llama.cpp"):
        run_child(command, f"llama.cpp cannot quantise this model to {kind}")


def importance_matrix(checkpoint: Path, unquantised: Path, samples: Tensor) -> dict[str, Tensor]:
    """How much each input of the layers' linear maps weighs on samples (N, T), float32 (d_in,), by
    the names of the weights in the GGUF file: llama.cpp's importance matrix, which is not asked of
    the output layer by default there either. A model too large for memory is read from disk."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, **placement_for(checkpoint)
    ).eval()
    names = _tensor_names(unquantised, model.config.num_hidden_layers)
    maps = {
        module: stored
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and _is_of_a_layer(stored := names.get_name(path))
    }
    squares = mean_squares_of_inputs(model, list(maps), samples)
    return {f"{maps[module]}.weight": values.float() for module, values in squares.items()}


@torch.inference_mode()
def mean_squares_of_inputs(
    model: nn.Module, maps: list[nn.Linear], samples: Tensor
) -> dict[nn.Linear, Tensor]:
    """The mean over all tokens of samples (N, T) of the squares of what enters each map: (d_in,),
    summed in float64."""
    sums = {module: torch.zeros(module.in_features, dtype=torch.float64) for module in maps}

    def add(module: nn.Linear, inputs: tuple[Any, ...]) -> None:
        sums[module] += inputs[0].flatten(end_dim=-2).double().square().sum(0)

    hooks = [module.register_forward_pre_hook(add) for module in maps]
    try:
        with progress("Weighing inputs", len(samples)) as advance:
            for sample in samples:
                model(input_ids=sample[None], use_cache=False)
                advance(1)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: total / samples.numel() for module, total in sums.items()}


@torch.inference_mode()
def mean_squares_of_inputs_reference(model: nn.Module, path: str, samples: Tensor) -> Tensor:
    """`mean_squares_of_inputs` of one map, by its path, token for token: (d_in,)."""
    entered: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, inputs: entered.append(inputs[0])
    )
    for sample in samples:
        model(input_ids=sample[None], use_cache=False)
    hook.remove()
    tokens = [token for sample in entered for token in sample[0]]
    return torch.stack([token * token for token in tokens]).mean(0)


def _tensor_names(file: Path, layers: int) -> Any:
    """What gguf calls the tensors of a model in a file."""
    named = _field(GGUFReader(file), Keys.General.ARCHITECTURE)
    architectures = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(architectures[named], layers)


def _is_of_a_layer(name: str | None) -> bool:
    """Whether a tensor of a GGUF file is, by its name."""
    return name is not None and name.startswith("blk.")


def _field(reader: GGUFReader, key: str) -> str:
    return str(reader.fields[key].contents())
