"""A GGUF file as a checkpoint: dequantised once to float32 safetensors, with the tokenizer that the
file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gradmap.common.console import announced, say, waiting
from gradmap.common.errors import UserError, first_line
from gradmap.common.failures import explain
from gradmap.common.files import cache_directory, sha256_file, write_json
from gradmap.common.made_once import CONFIG_FILE, is_made, made_once
from gradmap.common.reading import read_json_object
from gradmap.model.exact import refuse_inexact
from gradmap.model.gguf_head import Stored, finer_of, judge_head
from gradmap.model.gguf_metadata import require_read, require_understood, require_whole_file
from gradmap.model.gguf_tokenizer import (
    TokenizerSettings,
    load_gguf_tokenizer,
    read_header,
    read_metadata,
    read_settings,
    require_same_tokens,
)

# Part of the cached directory's name; raised when what is made of a file changes, so that it is
# made anew.
CONVERSION = 4


def dequantise_gguf(source: Path) -> Path:
    """Returns a cached float32 checkpoint with the GGUF's weights, config and tokenizer.

    Raises UserError if there is no such file, or none that transformers reads.
    """
    target = _dequantised(source)

    def make(directory: Path) -> None:
        with announced(f"Dequantising {source} to float32 in {target} (once)"):
            _write_dequantised(source, directory)

    return made_once(target, make)


def read_gguf_config(source: Path) -> dict[str, Any]:
    """The config alone, of the dequantised checkpoint if there is one. Raises UserError as
    `dequantise_gguf` does."""
    from transformers import AutoConfig

    target = _dequantised(source)
    if is_made(target):
        return read_json_object(target / CONFIG_FILE)
    try:
        return dict(AutoConfig.from_pretrained(source.parent, gguf_file=source.name).to_dict())
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise _unreadable(source, error) from None


def read_license(source: Path) -> str | None:
    """The license that the file names, such as `apache-2.0`; None if it names none."""
    name = read_metadata(source).get("general.license")
    return None if name is None else str(name)


def _write_dequantised(source: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        metadata, names = read_header(source)
        require_whole_file(metadata, source)
        model, report = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        refuse_inexact(report, str(source))
        require_understood(metadata, model.config, source)
        require_read(names, _read_names(model, str(metadata["general.architecture"])), source)
        _settle_head(model, source)
        _set_ends(model, read_settings(source))
        tokenizer = load_gguf_tokenizer(source)
    except UserError:
        raise
    except (ValueError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
        raise _unreadable(source, error) from None
    model.save_pretrained(directory)
    _save_tokenizer(tokenizer, source, directory)


def _set_ends(model: Any, settings: TokenizerSettings) -> None:
    """Says in config.json and generation_config.json what begins and ends a generation;
    transformers' reader does not know the end of a turn, so that a chat would not stop there."""
    ends = list(settings.end_ids)
    for config in (model.config, model.generation_config):
        config.bos_token_id = settings.special_ids.get("bos_token")
        config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)


def _settle_head(model: Any, source: Path) -> None:
    """Ties a head that is the embeddings stored a second time, and says what was found."""
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head is embeddings:
        return
    types = _tensor_types(source)
    stored = (
        Stored(head.detach(), types["output.weight"]),
        Stored(embeddings.detach(), types["token_embd.weight"]),
    )
    verdict = judge_head(*stored)
    say(f"In {source}, {verdict.describe()}")
    if verdict.tied:
        embeddings.data = finer_of(*stored).values
        model.config.tie_word_embeddings = True
        model.tie_weights()


def _read_names(model: Any, architecture: str) -> set[str]:
    """The names, in a file, of the tensors that transformers reads; experts have one name for all
    of them."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    return set(get_gguf_hf_weights_map(model, processor))


def _tensor_types(source: Path) -> dict[str, str]:
    """The names of the GGML types that the tensors of a file are stored in, by the tensors'
    names."""
    from gguf import GGUFReader

    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(source).tensors}


def _save_tokenizer(tokenizer: Any, source: Path, directory: Path) -> None:
    """Under the class that takes tokenizer.json as it is; a family's own would rebuild it from the
    vocabulary."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(directory)
    settings = directory / "tokenizer_config.json"
    write_json(settings, read_json_object(settings) | {"tokenizer_class": "TokenizersBackend"})
    require_same_tokens(AutoTokenizer.from_pretrained(directory), source)


def _dequantised(source: Path) -> Path:
    """Where the checkpoint made of a GGUF file is, or will be. Raises UserError if there is no such
    file."""
    if not source.is_file():
        raise UserError(f"{source} does not exist; check --gguf-file.")
    with waiting(f"Hashing {source}"):
        return cache_directory() / "dequantised" / f"{sha256_file(source)[:16]}-{CONVERSION}"


def _unreadable(source: Path, error: Exception) -> UserError:
    return explain(error) or UserError(
        f"{source} cannot be read as a GGUF model: {first_line(error)}"
    )
