"""What is written for every format: a folded checkpoint, alone or as the source of what is made of
it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.fold import FoldedTensor, plan_fold, write_folded
from export.quantisation import CONFIG_KEY, quantisation_config, unquantised
from gradmap.common.errors import UserError
from gradmap.common.files import write_json
from gradmap.common.reading import read_json_object
from gradmap.model.architectures import architecture_of
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.configs import prune_config
from gradmap.model.corrections import Changes
from gradmap.model.model_files import CODE_KEY, copy_files
from gradmap.model.precision import DTYPES
from gradmap.model.sublayers import Pair
from gradmap.pruning.plan import CalibrationRecord, Plan

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


# What a quantised model is judged on, of each sample so many tokens: 1000 positions, of which a
# share of 90% errs by 1%.
JUDGING_SAMPLES = 8
JUDGING_TOKENS = 128


@dataclass(frozen=True)
class Source:
    """What is exported: a checkpoint with a plan applied (or, without one, the dense model).

    probe_ids: (B, T), what an artifact has to reproduce the logits of. samples: texts (N, T) that
    quantisation is calibrated and judged on, of which `calibration` says what they are; None
    without any.
    """

    checkpoint: Checkpoint
    plan: Plan | None
    plan_hash: str | None
    changes: Changes
    probe_ids: Tensor
    samples: Tensor | None = None
    calibration: CalibrationRecord | None = None

    @property
    def quantised_probe_ids(self) -> Tensor:
        """What a quantised artifact is judged on: more texts, where there are some."""
        if self.samples is None:
            return self.probe_ids
        return self.samples[:JUDGING_SAMPLES, :JUDGING_TOKENS]

    @property
    def fit_ids(self) -> Tensor:
        """The samples (N, T) that quantisation is calibrated on, which are not those that it is
        judged on: (0, 0) without any."""
        return torch.empty(0, 0).long() if self.samples is None else self.samples[JUDGING_SAMPLES:]

    @property
    def removed(self) -> tuple[Pair, ...]:
        return () if self.plan is None else tuple(self.plan.removal_order)

    @property
    def served_name(self) -> str:
        """`SmolLM2-135M-Instruct-minus-8` for a model of which 8 layers were removed."""
        base = Path(self.checkpoint.name).name.removesuffix(".gguf")
        return base if self.plan is None else f"{base}-minus-{len(self.plan.removal_order)}"


@dataclass(frozen=True)
class Storage:
    """How weights are stored.

    dtype: a key of DTYPES, or "keep" for the checkpoint's own. quantise: None or a key of
    export.formats.format.QUANTISATIONS.
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
    SHA-256 of the files that were hashed on the way. calibrated: whether they were quantised with a
    look at the source's samples.
    """

    config: dict[str, Any]
    folded: Sequence[FoldedTensor]
    weight_bytes: int
    hashes: dict[str, str]
    calibrated: bool = False


def write_checkpoint(
    directory: Path,
    source: Source,
    storage: Storage,
    quantise: str | None = None,
    widen_vectors: bool = False,
) -> Written:
    """A stock Hugging Face checkpoint: layers dropped, W' folded, the tokenizer and the rest
    copied. quantise, widen_vectors: as in export.fold.plan_fold.

    Raises UserError if the disk has no room for it.
    """
    checkpoint = source.checkpoint
    architecture = architecture_of(checkpoint.config)
    folded = plan_fold(
        checkpoint,
        architecture,
        source.removed,
        source.changes,
        storage.torch_dtype,
        quantise,
        widen_vectors,
    )
    weight_bytes = sum(tensor.stored_bytes for tensor in folded)
    _require_space(directory, weight_bytes)
    hashes = write_folded(directory, folded, storage.shard_bytes)
    config = artifact_config(checkpoint.config, source.removed, storage.dtype)
    if quantise is not None:
        config[CONFIG_KEY] = quantisation_config(quantise, unquantised(architecture))
    write_json(directory / "config.json", config)
    _copy_companions(checkpoint.directory, directory)
    return Written(config, folded, weight_bytes, hashes)


def write_through_checkpoint(
    directory: Path,
    source: Source,
    storage: Storage,
    convert: Callable[[Path], None],
    converted: str,
    widen_vectors: bool = False,
) -> Written:
    """Folds into a directory inside the artifact's, converts that, and leaves of it what is read
    beside the result. convert: writes, of a checkpoint's directory, the files `converted` (a
    pattern) into the artifact's. widen_vectors: as in export.fold.plan_fold."""
    checkpoint = directory / ".checkpoint"
    checkpoint.mkdir()
    written = write_checkpoint(checkpoint, source, storage, widen_vectors=widen_vectors)
    convert(checkpoint)
    write_json(directory / "config.json", written.config)
    _copy_companions(checkpoint, directory)
    shutil.rmtree(checkpoint)
    weight_bytes = sum(path.stat().st_size for path in directory.glob(converted))
    return Written(written.config, written.folded, weight_bytes, {})


def artifact_config(
    config: dict[str, Any], removed: Sequence[Pair], dtype_name: str
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


def _copy_companions(checkpoint: Path, directory: Path) -> None:
    copy_files(checkpoint, directory, COPIED_PATTERNS)
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return
    settings = read_json_object(path)
    stock = _stock_tokenizer(settings)
    if stock != settings:
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
