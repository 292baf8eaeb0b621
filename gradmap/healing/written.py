"""What the dense model writes to be healed on, kept in the cache directory: it is written once for
the same model, prompts and options."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gradmap.common.console import progress, say
from gradmap.common.files import atomic_file, cache_directory, sha256_json
from gradmap.common.locks import writing
from gradmap.common.reading import MALFORMED
from gradmap.data.calibration import bos_of
from gradmap.data.prompts import enough_to_write, questions
from gradmap.healing.options import HealOptions
from gradmap.healing.vllm_writer import VllmWriter
from gradmap.methods.writing import (
    WRITTEN_TOGETHER,
    draw_prompts,
    uniform_numbers,
    write_answers,
    written_together,
)
from gradmap.model.architectures import architecture_of
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.ends import end_tokens
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_model, resolve_device, resolve_dtype
from gradmap.model.precision import computing_in
from gradmap.runtimes.vllm_environment import vllm_dtype

# Part of the key; raised when what is written for the same key changes.
WRITING = 1
# So many times WRITTEN_TOGETHER texts are begun before it is seen how long they became.
MOST_GROUPS = 16

Ids = tuple[int, ...]
# Prompts, and what follows each: of these prompts, so many tokens at most, when so many texts were
# written before. Is told how many tokens more there are.
Continued = Callable[[Sequence[list[int]], int, int, Callable[[int], None]], list[Ids]]


def written_documents(
    checkpoint: Checkpoint, options: HealOptions, tokenizer: Any
) -> list[Ids] | None:
    """Texts of `--written` tokens together, without BOS; None if there are to be none.

    Of several processes one writes, and the others wait for its file. Raises UserError as
    `prompts_of` does.
    """
    if options.written is None:
        return None
    dtype = resolve_dtype(options.dtype, resolve_device(options.device), checkpoint)
    prompts = prompts_of(options, tokenizer)
    key = {
        "writing": WRITING,
        "model": checkpoint.file_hashes,
        "prompts": sha256_json(prompts),
        "dtype": dtype,
        **options.model_dump(include={"written", "writer", "tokens", "chat", "seed"}),
    }
    path = cache_directory() / "written" / f"{sha256_json(key)}.safetensors"
    with writing(path, wait=True):
        documents = _load(path)
        if documents is None:
            documents = _write(checkpoint, prompts, options, dtype, tokenizer)
            _save(documents, path)
        else:
            say(f"What the dense model wrote before is read from {path}")
    front = 0 if bos_of(tokenizer) is None else 1
    return [document[front:] for document in documents]


def prompts_of(options: HealOptions, tokenizer: Any) -> list[list[int]]:
    """At least as many as `--written` needs: the questions of conversations with `--chat`, else a
    few tokens from the texts. Raises UserError if texts have none."""
    assert options.written is not None, "something is to be written"
    mixture = options.mixture.without_written
    if options.chat:
        return enough_to_write(questions(mixture, tokenizer), options.written)
    count = math.ceil(options.written / options.tokens)
    samples = mixture.open(tokenizer)
    prompts: list[list[int]] = draw_prompts(
        samples.draw(count), samples.bos, count, options.seed
    ).tolist()
    return prompts


def _write(
    checkpoint: Checkpoint,
    prompts: Sequence[list[int]],
    options: HealOptions,
    dtype: str,
    tokenizer: Any,
) -> list[Ids]:
    ends = _end_tokens(checkpoint, tokenizer) if options.chat else frozenset[int]()
    if options.writer == "vllm":
        window = max(map(len, prompts)) + options.tokens
        started = VllmWriter.started(
            checkpoint.directory, vllm_dtype(options.dtype), window, ends, options.seed
        )
        with started as writer:
            return write_until_enough(writer.continued, prompts, options)
    network = load_model(checkpoint, dtype, options.device)
    model = LayeredModel(network, architecture_of(checkpoint.config))
    with computing_in(dtype, network):
        return write_until_enough(partial(_continued, model, ends, options.seed), prompts, options)


def _end_tokens(checkpoint: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """Behind an answer: EOS, and what else the model's generation config names."""
    named = end_tokens(checkpoint.directory, checkpoint.config)
    return frozenset(token for token in (*named, tokenizer.eos_token_id) if token is not None)


def write_until_enough(
    continued: Continued, prompts: Sequence[list[int]], options: HealOptions
) -> list[Ids]:
    """The first prompts with what the model goes on with, as many as have `--written` tokens
    together. Each becomes as long as a sample, or has an answer of so many tokens at most."""
    assert options.written is not None
    to_draw = options.tokens if options.chat else options.tokens - len(prompts[0])
    documents: list[Ids] = []
    lacking = options.written
    with progress("The dense model writes (tokens)", options.written) as advance:
        while lacking > 0:
            groups = min(MOST_GROUPS, math.ceil(lacking / options.tokens / WRITTEN_TOGETHER))
            asked = prompts[len(documents) :][: groups * WRITTEN_TOGETHER]
            written = continued(asked, to_draw, len(documents), advance)
            documents += written
            lacking -= sum(map(len, written))
    return _first(documents, options.written)


def _continued(
    model: LayeredModel,
    ends: Collection[int],
    seed: int,
    prompts: Sequence[list[int]],
    most: int,
    first: int,
    advance: Callable[[int], None],
) -> list[Ids]:
    """By transformers, up to rounding the same on every device, however many are written at once.

    In the prompts' order; those of about the same length are continued together.
    """
    numbers = uniform_numbers(len(prompts), most, seed + first // WRITTEN_TOGETHER)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    longest = len(prompts[order[-1]]) + numbers.shape[1]
    together = written_together(model, torch.tensor(prompts[:1]), longest)
    written: dict[int, Ids] = {}
    for start in range(0, len(order), together):
        places = order[start : start + together]
        asked = [prompts[place] for place in places]
        answered = write_answers(model, asked, numbers[places], ends, advance)
        for place, ids in zip(places, answered, strict=True):
            written[place] = tuple(ids)
    return [written[place] for place in range(len(prompts))]


def _first(documents: Sequence[Ids], tokens: int) -> list[Ids]:
    """As many as have so many tokens together."""
    lengths = accumulate(map(len, documents))
    return [
        document
        for document, length in zip(documents, lengths, strict=True)
        if length - len(document) < tokens
    ]


def _save(documents: Sequence[Ids], path: Path) -> None:
    ids = torch.tensor([token for document in documents for token in document])
    lengths = torch.tensor([len(document) for document in documents])
    with atomic_file(path) as partial:
        save_file({"ids": ids, "lengths": lengths}, partial)


def _load(path: Path) -> list[Ids] | None:
    """None if it is not there, or damaged."""
    if not path.is_file():
        return None
    try:
        stored = load_file(path)
        parts = stored["ids"].split(stored["lengths"].tolist())
    except (SafetensorError, *MALFORMED):
        return None
    return [tuple(part.tolist()) for part in parts]
