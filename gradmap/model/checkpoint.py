"""Opens and checks what the user names as a model: a directory, a GGUF file in it, or a hub id."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from gradmap.common.console import waiting
from gradmap.common.errors import UserError, first_line
from gradmap.common.files import sha256_file
from gradmap.common.reading import checked, read_json, read_json_object
from gradmap.model.configs import complete_config, layer_count_key
from gradmap.model.exact import require_exact
from gradmap.model.gguf_model import dequantise_gguf, read_gguf_config
from gradmap.model.model_files import (
    COMPANION_PATTERNS,
    INDEX_NAME,
    SINGLE_NAME,
    PlainName,
    own_file,
    own_files,
)
from gradmap.model.model_sizes import context_length
from gradmap.model.pickled import PICKLED_WEIGHTS, convert_pickled
from gradmap.model.safetensors_reader import check_safetensors


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint on disk: safetensors only, of a supported causal language model.

    name: what the user typed (with the GGUF file, if any).
    config: the contents of config.json.
    weight_files: the safetensors files, in order.
    gguf_file: what it was dequantised from, if it was.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    gguf_file: Path | None = None

    @cached_property
    def positions(self) -> int | None:
        """How many tokens the model takes at once; None if its config sets no limit."""
        return context_length(complete_config(self.config))

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of config.json and of every weight file, by name; read once, for they can be
        large."""
        paths = (self.directory / "config.json", *self.weight_files)
        names = [str(path.relative_to(self.directory)) for path in paths]
        hashing = waiting(f"Hashing the weights of {self.name}")
        with hashing, ThreadPoolExecutor() as threads:  # hashing lets other threads run
            return dict(zip(names, threads.map(sha256_file, paths), strict=True))


class _Config(BaseModel):
    """What must be of its kind for a config to be judged at all."""

    model_type: str | None = None
    architectures: list[str] | None = None


class _Index(BaseModel):
    """What is read of an index. weight_map: tensor -> weight file."""

    weight_map: dict[str, PlainName]


def open_checkpoint(
    model: str,
    gguf_file: str | None = None,
    allow_pickle: bool = False,
    allow_quantised: bool = False,
) -> Checkpoint:
    """Finds a model and checks that it can be pruned, and is whole, without loading weights.

    A GGUF file is dequantised once to float32 safetensors in the cache directory; with
    `allow_pickle`, legacy `.bin` weights are converted there too. allow_quantised: for a runtime
    that reads such weights, and checks them, itself. Raises UserError for: a missing model, an
    adapter, a quantised or encoder model, an unsupported family, pickled weights, a missing or
    truncated weight file, tensors that are missing, unknown or of another shape.
    """
    source = None
    weights = ["*.safetensors", *([PICKLED_WEIGHTS] if allow_pickle else [])]
    directory = _find_directory(model, [*COMPANION_PATTERNS, *weights])
    if gguf_file is not None:
        source = directory / gguf_file
        directory = dequantise_gguf(source)
    config = _read_config(directory, model)
    _refuse_unsuitable(config, model, allow_quantised)
    own_files(directory, COMPANION_PATTERNS)
    if allow_pickle and not _safetensors_names(directory):
        directory = convert_pickled(directory)
    weight_files = _weight_files(directory)
    for path in weight_files:
        check_safetensors(path)
    name = model if gguf_file is None else f"{model}/{gguf_file}"
    if not is_quantised(config):
        require_exact(directory, name)
    return Checkpoint(name, directory, config, weight_files, source)


def read_config(model: str, gguf_file: str | None = None) -> dict[str, Any]:
    """The config alone of a model, with its family's defaults filled in: no weights are read,
    converted or fetched.

    Raises UserError as `open_checkpoint` does, where a config tells.
    """
    directory = _find_directory(model, ["config.json", "adapter_config.json"])
    if gguf_file is not None:
        config = read_gguf_config(directory / gguf_file)
        return complete_config(config)
    config = _read_config(directory, model)
    _refuse_unsuitable(config, model)
    return complete_config(config)


def _find_directory(model: str, patterns: list[str]) -> Path:
    """patterns: of the files that are fetched if it is a model of the hub."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(
            f"{model} is a file; name its directory (for a GGUF: --model DIRECTORY --gguf-file "
            "NAME)."
        )
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"Model {model} does not exist; give a directory or a hub id such as org/name."
        )
    return _download(model, patterns)


def _download(model_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with waiting(f"Fetching {model_id} from the hub"):
            return Path(snapshot_download(model_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"Model {model_id} is no local directory and could not be fetched from the hub: "
            f"{first_line(error)}"
        ) from None


def _read_config(directory: Path, model: str) -> dict[str, Any]:
    if own_file(directory, "adapter_config.json").exists():
        raise UserError(
            f"{model} is an adapter; merge it into its base model first (peft: merge_and_unload)."
        )
    if not own_file(directory, "config.json").exists():
        ggufs = sorted(path.name for path in directory.glob("*.gguf"))
        cure = f"add --gguf-file {ggufs[0]}" if ggufs else "name a Hugging Face model directory"
        raise UserError(f"{model} has no config.json; {cure}.")
    path = directory / "config.json"
    config = read_json_object(path)
    checked(_Config, config, path)
    return config | {"architectures": config.get("architectures") or _stock_architectures(config)}


def is_quantised(config: dict[str, Any]) -> bool:
    """Whether a config says that the weights are."""
    return bool(config.get("quantization_config"))


def _refuse_unsuitable(config: dict[str, Any], model: str, allow_quantised: bool = False) -> None:
    if is_quantised(config) and not allow_quantised:
        raise UserError(
            f"{model} is quantised; prune the unquantised model and quantise afterwards."
        )
    architectures = config["architectures"]
    if config.get("auto_map") and not _is_native(config.get("model_type"), architectures):
        raise UserError(
            f"{model} needs remote code, which is not run; use a model that transformers itself "
            "supports."
        )
    if "text_config" in config:
        raise UserError(
            f"{model} reads more than text ({', '.join(architectures)}); save its language model "
            "as a checkpoint of its own, and name that."
        )
    if config.get("is_encoder_decoder") or not any(
        name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures
    ):
        raise UserError(
            f"{model} is not a causal language model (architectures: {architectures or 'none'})."
        )
    for key in (layer_count_key(config), "vocab_size"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(
                f"config.json of {model}: {key} is {config.get(key)!r}, where a count is expected."
            )


def _stock_architectures(config: dict[str, Any]) -> list[str]:
    """The class that transformers takes for the family, where a config names none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    return [stock] if isinstance(stock, str) else []


def _is_native(model_type: str | None, architectures: list[str]) -> bool:
    """Whether transformers itself has the class. Some checkpoints (Phi-3) carry code from before it
    did."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) in architectures


def _safetensors_names(directory: Path) -> list[str]:
    """The single weight file, or those that the directory's index names: transformers, too, does
    not read an index beside a single file. Empty if it has neither."""
    if own_file(directory, SINGLE_NAME).exists():
        return [SINGLE_NAME]
    index = own_file(directory, INDEX_NAME)
    return (
        sorted(set(checked(_Index, read_json(index), index).weight_map.values()))
        if index.exists()
        else []
    )


def _weight_files(directory: Path) -> tuple[Path, ...]:
    names = _safetensors_names(directory)
    if not names and any(directory.glob(PICKLED_WEIGHTS)):
        raise UserError(
            f"{directory} has pickled weights only, and a pickle can run code when it is read; "
            "with --allow-pickle they are converted to safetensors by torch's restricted reader "
            "(plain tensors only)."
        )
    paths = tuple(own_file(directory, name) for name in names or [SINGLE_NAME])
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise UserError(
            f"{directory} lacks the weight file {missing[0]}; fetch the checkpoint again."
        )
    return paths
