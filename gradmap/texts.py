"""Text sources: a SPEC on the command line or in a recipe becomes a list of documents.

wikipedia, wikitext2, c4, ptb, stackexchange, bookcorpus     a preset (the paper's Table 7)
hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]                           a data set on the hub
file:PATH[#FIELD]                                            txt, jsonl, jsonl.gz or parquet
disk:DIR:COLUMN                                              a directory written by `datasets.save_to_disk`
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gradmap.console import waiting
from gradmap.errors import UserError

PRESETS = {
    "wikipedia": "hub:wikimedia/wikipedia:20231101.en:train:text",
    "wikitext2": "hub:mikasenghaas/wikitext-2::test:text",
    "c4": "hub:allenai/c4:en:validation:text",
    "ptb": "hub:ptb-text-only/ptb_text_only::test:sentence",
    "stackexchange": "hub:ArmelR/stack-exchange-instruction::train:question",  # the paper's Table 7 has ArmelIR
    "bookcorpus": "hub:bookcorpus/bookcorpus::train:text",
}
# A hub data set can be far larger than what calibration needs: shuffled reading stops here.
HUB_DOCUMENTS = 10_000


def read_texts(spec: str, seed: int) -> list[str]:
    """Returns the distinct non-empty documents of a SPEC in an order that `seed` fixes.

    Raises UserError if the SPEC is malformed or its data is missing or empty.
    """
    with waiting(f"Reading {spec}"):
        texts = _open_source(spec, seed)
        documents = list(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))
    if not documents:
        raise UserError(f"Text source {spec} has no text; check its field or column.")
    random.Random(seed).shuffle(documents)
    return documents


def _open_source(spec: str, seed: int) -> Iterable[Any]:
    match PRESETS.get(spec, spec).partition(":"):
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


def _read_hub(rest: str, seed: int) -> Iterator[Any]:
    from datasets import load_dataset

    name, config, split, column = [*rest.split(":"), "", "", ""][:4]
    column = column or "text"
    try:
        stream = load_dataset(name, config or None, split=split or "train", streaming=True)
        shuffled = stream.shuffle(seed=seed, buffer_size=HUB_DOCUMENTS)
        return iter([row[column] for row in islice(shuffled, HUB_DOCUMENTS)])
    except KeyError:
        raise UserError(f"Hub data set {name} has no column {column!r}.") from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a data set that is a script
        raise UserError(f"Hub data set {name} could not be read ({error}); use file: or disk: offline.") from None
