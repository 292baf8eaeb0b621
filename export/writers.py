"""What is written for each format: a folded checkpoint, alone or as the source of an ONNX graph or
a GGUF file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from export import GGUF_FILE
from export.fold import FoldedTensor, plan_fold, write_folded
from export.quantisation import quantisation_config
from export.verification import run_child
from export.vllm_file import write_vllm_file
from gradmap.common.children import module_command
from gradmap.common.console import announced
from gradmap.common.errors import UserError
from gradmap.common.files import write_json
from gradmap.common.reading import read_json_object
from gradmap.model.architectures import architecture_of, prune_config
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.corrections import Changes
from gradmap.model.model_files import CODE_KEY, copy_files
from gradmap.model.precision import DTYPES
from gradmap.pruning.plan import Plan

# Everything else that a checkpoint's users need; weights, config and model card are written anew.
COPIED_PATTERNS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "generation_config.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "LICENSE*",
    "NOTICE*",
)
# What is written anew, or was read in another form.
REPLACED_PATTERNS = ("config.json", "README.md", "*.safetensors*", "*.bin*", "*.gguf", "*.py")
# Tracing holds the model, the graph's copy of its weights and the file being written.
ONNX_MEMORY_FACTOR = 4
GENAI_PRECISIONS = {"float32": "fp32", "float16": "fp16"}
GGUF_CONVERTER = "convert-hf-to-gguf"
GGUF_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "q8_0"}
CONVERTED = ("*.onnx*", "*.gguf")


@dataclass(frozen=True)
class Source:
    """What is exported: a checkpoint with a plan applied (or, without one, the dense model)."""

    checkpoint: Checkpoint
    plan: Plan | None
    plan_hash: str | None
    changes: Changes
    probe_ids: Tensor

    @property
    def removed(self) -> tuple[int, ...]:
        return () if self.plan is None else tuple(self.plan.removal_order)

    @property
    def served_name(self) -> str:
        """`SmolLM2-135M-Instruct-minus-8` for a model of which 8 layers were removed."""
        base = Path(self.checkpoint.name).name.removesuffix(".gguf")
        return base if self.plan is None else f"{base}-minus-{len(self.plan.removal_order)}"


@dataclass(frozen=True)
class Target:
    """How weights are stored.

    dtype: a key of DTYPES, or "keep" for the checkpoint's own. quantise: None or "int8".
    """

    dtype: str
    quantise: str | None
    shard_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None keeps each tensor's own."""
        return None if self.dtype == "keep" else DTYPES[self.dtype]


@dataclass(frozen=True)
class Written:
    """What is known of a directory once it is written.

    folded: the checkpoint's tensors. weight_bytes: size of the weights as they are stored. hashes:
    SHA-256 of the files that were hashed on the way.
    """

    config: dict[str, Any]
    folded: Sequence[FoldedTensor]
    weight_bytes: int
    hashes: dict[str, str]


Writer = Callable[[Path, Source, Target], Written]


def write_checkpoint(directory: Path, source: Source, target: Target) -> Written:
    """A stock Hugging Face checkpoint: layers dropped, W' folded, the tokenizer and the rest
    copied."""
    return _write_weights(directory, source, target, quantise=False)


def write_vllm(directory: Path, source: Source, target: Target) -> Written:
    """The same, quantised if asked for, with vllm.yaml for `vllm serve DIRECTORY --config
    DIRECTORY/vllm.yaml`."""
    written = _write_weights(directory, source, target, quantise=target.quantise is not None)
    dtype = "auto" if target.dtype == "keep" else target.dtype
    write_vllm_file(directory, source.served_name, dtype)
    return written


def write_onnx(directory: Path, source: Source, target: Target) -> Written:
    """An ONNX graph of the standard's operators (int8: with ONNX Runtime's MatMulNBits), named as
    optimum names it."""
    metadata = {
        "gradmap.name": source.served_name,
        "gradmap.plan_sha256": source.plan_hash or "none",
    }
    quantise = [target.quantise] if target.quantise else []

    def convert(checkpoint: Path) -> None:
        _require_memory(checkpoint)
        arguments = [str(checkpoint), str(directory), json.dumps(metadata), *quantise]
        with announced("Tracing the ONNX graph"):
            run_child(
                module_command("export.onnx_export", *arguments),
                "The model cannot be exported to ONNX",
            )

    return _write_through_checkpoint(directory, source, target, convert)


def write_genai(directory: Path, source: Source, target: Target) -> Written:
    """An ONNX graph with ONNX Runtime's own fused operators and genai_config.json, by
    onnxruntime-genai's builder."""
    precision = target.quantise or GENAI_PRECISIONS[target.dtype]
    provider = "cuda" if torch.cuda.is_available() and target.dtype == "float16" else "cpu"

    def convert(checkpoint: Path) -> None:
        _require_memory(checkpoint)
        places = ["-m", str(checkpoint), "-o", str(directory), "-c", str(checkpoint / "cache")]
        command = module_command(
            "onnxruntime_genai.models.builder", *places, "-p", precision, "-e", provider
        )
        with announced("Building the onnxruntime-genai graph"):
            run_child(command, "onnxruntime-genai cannot build this model")

    return _write_through_checkpoint(directory, source, target, convert)


def write_gguf(directory: Path, source: Source, target: Target) -> Written:
    """One file for llama.cpp and what builds on it, by llama.cpp's own converter."""
    converter = find_gguf_converter()
    stored_type = GGUF_TYPES[target.quantise or target.dtype]

    def convert(checkpoint: Path) -> None:
        command = [
            converter,
            str(checkpoint),
            "--outfile",
            str(directory / GGUF_FILE),
            "--outtype",
            stored_type,
        ]
        with announced("Converting to GGUF"):
            run_child(
                [*command, "--model-name", source.served_name],
                "llama.cpp's converter cannot convert this model",
            )

    return _write_through_checkpoint(directory, source, target, convert)


def find_gguf_converter() -> str:
    """The converter's path. It overwrites files of the package gguf, so it has to live in an
    environment of its own."""
    converter = shutil.which(GGUF_CONVERTER)
    if converter is None:
        raise UserError(
            f"Format gguf needs llama.cpp's converter as the program {GGUF_CONVERTER}; install it "
            f"in an environment of its own: pipx install {GGUF_CONVERTER}, or uv tool install "
            f"{GGUF_CONVERTER}."
        )
    return converter


def artifact_config(
    config: dict[str, Any], removed: Sequence[int], dtype_name: str
) -> dict[str, Any]:
    """Returns the config.json of an artifact: per-layer fields follow the removal, the dtype is
    what was written.

    transformers 5 renamed `torch_dtype`, Qwen3-MoE's `num_experts`, and
    `rope_theta`/`rope_scaling`; older consumers ignore the new names (and would silently use a
    theta of 10000), so both are written.
    """
    pruned = prune_config(config, removed)
    for key in ("_name_or_path", "_model_name_or_path", CODE_KEY):
        pruned.pop(key, None)
    dtype = dtype_name if dtype_name != "keep" else pruned.get("dtype") or pruned.get("torch_dtype")
    if dtype is not None:
        pruned |= {"dtype": dtype, "torch_dtype": dtype}
    if pruned["model_type"] == "qwen3_moe" and "num_local_experts" in pruned:
        pruned["num_experts"] = pruned["num_local_experts"]
    rope = pruned.get("rope_parameters")
    if rope is not None and "sliding_attention" in rope:  # Gemma 3: one for each kind of layer
        pruned["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope is not None and "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        pruned["rope_theta"] = rope["rope_theta"]
        pruned["rope_scaling"] = (
            None if scaling.get("rope_type", "default") == "default" else scaling
        )
    return pruned


def _write_weights(directory: Path, source: Source, target: Target, quantise: bool) -> Written:
    checkpoint = source.checkpoint
    architecture = architecture_of(checkpoint.config)
    folded = plan_fold(
        checkpoint, architecture, source.removed, source.changes, target.torch_dtype, quantise
    )
    weight_bytes = sum(tensor.stored_bytes for tensor in folded)
    _require_space(directory, weight_bytes)
    hashes = write_folded(directory, folded, target.shard_bytes)
    config = artifact_config(checkpoint.config, source.removed, target.dtype)
    if quantise:
        config["quantization_config"] = quantisation_config()
    write_json(directory / "config.json", config)
    _copy_companions(checkpoint.directory, directory)
    return Written(config, folded, weight_bytes, hashes)


def _write_through_checkpoint(
    directory: Path, source: Source, target: Target, convert: Callable[[Path], None]
) -> Written:
    """Folds into a directory inside the artifact's, converts that, and leaves of it what is read
    beside the result."""
    checkpoint = directory / ".checkpoint"
    checkpoint.mkdir()
    written = write_checkpoint(checkpoint, source, target)
    convert(checkpoint)
    write_json(directory / "config.json", written.config)
    _copy_companions(checkpoint, directory)
    shutil.rmtree(checkpoint)
    converted_bytes = sum(
        path.stat().st_size for pattern in CONVERTED for path in directory.glob(pattern)
    )
    return Written(written.config, written.folded, converted_bytes, {})


def left_behind(checkpoint: Checkpoint) -> list[str]:
    """The files of a model's directory that no artifact gets: what gradmap does not know, hidden
    ones aside."""
    known = (*COPIED_PATTERNS, *REPLACED_PATTERNS)
    return sorted(
        path.name
        for path in checkpoint.directory.iterdir()
        if path.is_file()
        and path.name[0] != "."
        and not any(fnmatch(path.name, pattern) for pattern in known)
    )


def _copy_companions(source: Path, target: Path) -> None:
    copy_files(source, target, COPIED_PATTERNS)
    path = target / "tokenizer_config.json"
    if (
        path.exists()
        and (stock := _stock_tokenizer(settings := read_json_object(path))) != settings
    ):
        write_json(path, stock)


def _stock_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as any reader knows them, without code of the model's author: transformers 5
    calls its fast tokenizer TokenizersBackend, which transformers 4 does not know; 5 knows both."""
    stock = {key: value for key, value in settings.items() if key != CODE_KEY}
    if stock.get("tokenizer_class") == "TokenizersBackend":
        stock["tokenizer_class"] = "PreTrainedTokenizerFast"
    return stock


def _require_space(directory: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed_bytes > free:
        raise UserError(
            f"The disk of {directory.parent} has {free / 1e9:.1f} GB free where "
            f"{needed_bytes / 1e9:.1f} GB of weights are to be written; free some space or name "
            "another --out."
        )


def _require_memory(checkpoint: Path) -> None:
    needed = ONNX_MEMORY_FACTOR * sum(
        path.stat().st_size for path in checkpoint.glob("*.safetensors")
    )
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"Exporting this model to ONNX needs about {needed / 1e9:.0f} GB of memory, "
            f"{available / 1e9:.0f} GB are free; use a larger machine, or --dtype float16."
        )
