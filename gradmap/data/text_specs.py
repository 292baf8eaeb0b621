"""What names a text, on the command line or in a recipe: a SPEC becomes a source. Nothing is read
here.

wikipedia, wikitext2, c4, ptb, stackexchange, bookcorpus     a preset (the data sets of the paper's
Table 7) hub:NAME[:CONFIG[:SPLIT[:FIELD]]]                            a data set on the hub
file:PATH[#FIELD]                                            txt, jsonl, jsonl.gz or parquet
disk:DIR:FIELD                                               a directory written by
`datasets.save_to_disk` sharegpt:PATH                                                recorded
conversations, for load tests and `gradmap heal --chat` alone

A field may be nested: `doc.body`, `messages.0.content`. A path may begin with ~, and may have # in
its names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradmap.common.errors import UserError

# Between the rows of a text that perplexity is measured on, where public code has nothing else for
# it.
SEPARATOR = "\n\n"
DEFAULT_FIELD = "text"
# Under which ShareGPT's records have their turns.
SHAREGPT_FIELD = "conversations"
# What stands behind the first known suffix is a field, if it begins with # and is no path.
_FILE = re.compile(r"(?P<path>.+?\.(?:txt|jsonl|jsonl\.gz|parquet))(?:#(?P<field>[^/]*))?")


@dataclass(frozen=True)
class Preset:
    """A data set of the hub. calibration, evaluation: SPECs; the same where it has one split only.

    separator, rows: what public code joins the rows with that perplexity is measured on, and how
    many it takes.
    """

    calibration: str
    evaluation: str
    separator: str = SEPARATOR
    rows: int | None = None


WIKIPEDIA = "hub:wikimedia/wikipedia:20231101.en:train:text"
# The paper's Table 7 has ArmelIR.
STACK_EXCHANGE = "hub:ArmelR/stack-exchange-instruction::train:question"
BOOK_CORPUS = "hub:bookcorpus/bookcorpus::train:text"
# WikiText2 and PTB are evaluated as in LLM-Pruner, whose segments have 128 tokens too; C4 as in
# SparseGPT and SLEB.
PRESETS = {
    "wikipedia": Preset(WIKIPEDIA, WIKIPEDIA),
    "wikitext2": Preset(
        "hub:Salesforce/wikitext:wikitext-2-raw-v1:train:text",
        "hub:Salesforce/wikitext:wikitext-2-raw-v1:test:text",
    ),
    "c4": Preset(
        "hub:allenai/c4:en:train:text",
        "hub:allenai/c4:en:validation:text",
        separator=" ",
        rows=1100,
    ),
    "ptb": Preset(
        "hub:ptb-text-only/ptb_text_only::train:sentence",
        "hub:ptb-text-only/ptb_text_only::validation:sentence",
    ),
    "stackexchange": Preset(STACK_EXCHANGE, STACK_EXCHANGE),
    "bookcorpus": Preset(BOOK_CORPUS, BOOK_CORPUS),
}


@dataclass(frozen=True)
class FileSource:
    path: Path
    field: str = DEFAULT_FIELD

    @property
    def is_json_lines(self) -> bool:
        return self.path.name.endswith((".jsonl", ".jsonl.gz"))


@dataclass(frozen=True)
class DiskSource:
    path: Path
    field: str


@dataclass(frozen=True)
class HubSource:
    name: str
    config: str | None
    split: str
    field: str


@dataclass(frozen=True)
class Conversations:
    path: Path
    field: str = SHAREGPT_FIELD


Source = FileSource | DiskSource | HubSource | Conversations


def preset_of(spec: str) -> Preset:
    """The preset of this name; a SPEC that is none's is read for calibration and evaluation
    alike."""
    return PRESETS.get(spec) or Preset(spec, spec)


def parse_source(spec: str) -> Source:
    """The source that a SPEC names; of a preset, that of its calibration split. Raises UserError if
    it names none."""
    kind, _, rest = preset_of(spec).calibration.partition(":")
    directory, _, field = rest.rpartition(":")
    match kind:
        case "file" if rest:
            return _file_source(rest)
        case "disk" if directory and field:
            return DiskSource(_path(directory), field)
        case "hub" if rest:
            name, config, split, field = [*rest.split(":"), "", "", ""][:4]
            return HubSource(name, config or None, split or "train", field or DEFAULT_FIELD)
        case "sharegpt" if rest:
            return Conversations(_path(rest))
    raise UserError(
        f"Text source {spec!r} is not understood; use file:PATH[#FIELD], disk:DIR:COLUMN, "
        f"hub:NAME[:CONFIG[:SPLIT[:COLUMN]]] or a preset ({', '.join(PRESETS)})."
    )


def source_files(spec: str) -> tuple[Path, ...]:
    """The file or directory that a SPEC names, if it names one. Raises UserError as `parse_source`
    does."""
    source = parse_source(spec)
    return () if isinstance(source, HubSource) else (source.path,)


def named_sources(specs: Sequence[str]) -> dict[str, str]:
    """`squad=file:a.jsonl` is named squad; a SPEC without a name is its own name."""
    named: dict[str, str] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not equals or ":" in name:
            name, source = spec, spec
        named[name] = source
    return named


def _file_source(rest: str) -> FileSource:
    known = _FILE.fullmatch(rest)
    if known is None:
        raise UserError(
            f"Text file {rest} is of an unknown kind; use .txt, .jsonl, .jsonl.gz or .parquet."
        )
    return FileSource(_path(known["path"]), known["field"] or DEFAULT_FIELD)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{text} names the home directory of a user who is not known; check the path."
        ) from None
