"""Text sources: a SPEC on the command line or in a recipe becomes a list of documents.

wikipedia, wikitext2, c4, ptb, stackexchange, bookcorpus     a preset (the data sets of the paper's Table 7)
hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]                           a data set on the hub
file:PATH[#FIELD]                                            txt, jsonl, jsonl.gz or parquet
disk:DIR:COLUMN                                              a directory written by `datasets.save_to_disk`
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gradmap.console import waiting
from gradmap.errors import UserError

# A hub data set can be far larger than what is needed: reading stops here.
HUB_DOCUMENTS = 10_000
# Between the rows of a text that perplexity is measured on, where public code has nothing else for it.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Preset:
    """A data set of the hub. calibration, evaluation: SPECs; the same where it has one split only.

    separator, rows: what public code joins the rows with that perplexity is measured on, and how many it takes.
    """

    calibration: str
    evaluation: str
    separator: str = SEPARATOR
    rows: int | None = None


WIKIPEDIA = "hub:wikimedia/wikipedia:20231101.en:train:text"
STACK_EXCHANGE = "hub:ArmelR/stack-exchange-instruction::train:question"  # the paper's Table 7 has ArmelIR
BOOK_CORPUS = "hub:bookcorpus/bookcorpus::train:text"
# WikiText2 and PTB are evaluated as in LLM-Pruner, whose segments have 128 tokens too; C4 as in SparseGPT and SLEB.
PRESETS = {
    "wikipedia": Preset(WIKIPEDIA, WIKIPEDIA),
    "wikitext2": Preset(
        "hub:Salesforce/wikitext:wikitext-2-raw-v1:train:text", "hub:Salesforce/wikitext:wikitext-2-raw-v1:test:text"
    ),
    "c4": Preset("hub:allenai/c4:en:train:text", "hub:allenai/c4:en:validation:text", separator=" ", rows=1100),
    "ptb": Preset(
        "hub:ptb-text-only/ptb_text_only::train:sentence", "hub:ptb-text-only/ptb_text_only::validation:sentence"
    ),
    "stackexchange": Preset(STACK_EXCHANGE, STACK_EXCHANGE),
    "bookcorpus": Preset(BOOK_CORPUS, BOOK_CORPUS),
}


def read_texts(spec: str, seed: int) -> list[str]:
    """Returns the distinct non-empty documents of a SPEC in an order that `seed` fixes; of a preset, its calibration
    split.

    Raises UserError if the SPEC is malformed or its data is missing or empty.
    """
    with waiting(f"Reading {spec}"):
        texts = _open_source(preset_of(spec).calibration, seed)
        documents = list(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))
    if not documents:
        raise _no_text(spec)
    random.Random(seed).shuffle(documents)
    return documents


def read_joined(spec: str) -> str:
    """Returns the rows of a SPEC as one text, in their order and as they are; of a preset, its evaluation split.

    Raises UserError as `read_texts` does.
    """
    preset = preset_of(spec)
    with waiting(f"Reading {spec}"):
        rows = [row for row in _open_source(preset.evaluation, None) if isinstance(row, str)]
        text = preset.separator.join(rows[: preset.rows])
    if not text.strip():
        raise _no_text(spec)
    return text


def preset_of(spec: str) -> Preset:
    """A SPEC that is no preset's name is read for calibration and evaluation alike."""
    return PRESETS.get(spec) or Preset(spec, spec)


def _no_text(spec: str) -> UserError:
    return UserError(f"Text source {spec} has no text; check its field or column.")


def _open_source(spec: str, seed: int | None) -> Iterable[Any]:
    """seed: shuffles what is too large to be read whole; None reads it in its order."""
    match spec.partition(":"):
        case "file", ":", rest if rest:
            return _read_file(rest)
        case "disk", ":", rest if ":" in rest:
            return _read_disk(rest)
        case "hub", ":", rest if rest:
            return _read_hub(rest, seed)
    raise UserError(
        f"Text source {spec!r} is not understood; use file:PATH[#FIELD], disk:DIR:COLUMN, "
        f"hub:NAME[:CONFIG[:SPLIT[:COLUMN]]] or a preset ({', '.join(PRESETS)})."
    )


def _read_file(rest: str) -> Iterator[Any]:
    name, _, field = rest.partition("#")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"Text file {path} does not exist; check the path.")
    if path.suffix == ".txt":
        return iter([path.read_text()])
    if path.suffix == ".parquet":
        return _read_parquet(path, field or "text")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path, field or "text")
    raise UserError(f"Text file {path} is of an unknown kind; use .txt, .jsonl, .jsonl.gz or .parquet.")


def _read_jsonl(path: Path, field: str) -> Iterator[Any]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
                for key in field.split("."):
                    value = value[key]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UserError(f"{path}, line {number} is no JSON object with a field {field!r}.") from None
            yield value


def _read_parquet(path: Path, column: str) -> Iterator[Any]:
    from pyarrow import ArrowInvalid, parquet

    try:
        return iter(parquet.read_table(path, columns=[column])[column].to_pylist())
    except (ArrowInvalid, KeyError):
        raise UserError(f"{path} is no parquet file with a column {column!r}.") from None


def _read_disk(rest: str) -> Iterator[Any]:
    from datasets import load_from_disk

    directory, _, column = rest.rpartition(":")
    try:
        dataset = load_from_disk(directory)
    except FileNotFoundError:
        raise UserError(f"{directory} is no directory written by datasets.save_to_disk; check the path.") from None
    if column not in dataset.column_names:
        raise UserError(f"The data set in {directory} has no column {column!r}.")
    return iter(dataset[column])


def _read_hub(rest: str, seed: int | None) -> Iterator[Any]:
    from datasets import load_dataset

    name, config, split, column = [*rest.split(":"), "", "", ""][:4]
    column = column or "text"
    try:
        stream = load_dataset(name, config or None, split=split or "train", streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=HUB_DOCUMENTS)
        return iter([row[column] for row in islice(stream, HUB_DOCUMENTS)])
    except KeyError:
        raise UserError(f"Hub data set {name} has no column {column!r}.") from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a data set that is a script
        raise UserError(f"Hub data set {name} could not be read ({error}); use file: or disk: offline.") from None
