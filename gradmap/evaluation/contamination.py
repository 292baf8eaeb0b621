"""What a plan was calibrated or healed on is not evaluated on: texts that overlap are refused, and
tasks leave documents out.

Texts overlap where they share 13 tokens in a row, as GPT-3's evaluation sets and training texts
were compared (Brown et al. 2020, arXiv 2005.14165, appendix C). There it was words; tokens need no
spaces between words, and are about nine English words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from gradmap.common.console import say
from gradmap.common.errors import UserError
from gradmap.common.files import ARTIFACT_FILE
from gradmap.common.reading import checked, read_json_object
from gradmap.data.calibration import build_calibration, without_bos
from gradmap.data.chat import ChatTemplate, special_ids
from gradmap.data.text_specs import preset_of
from gradmap.evaluation.perplexity import Segments
from gradmap.healing.options import HealOptions
from gradmap.healing.written import prompts_of
from gradmap.pruning.plan import (
    PLAN_FILE,
    CalibrationRecord,
    HealingRecord,
    load_calibration_ids,
    load_plan,
)

GRAM_TOKENS = 13


@dataclass(frozen=True)
class SeenSamples:
    """Samples (N, T), without BOS, that a plan was made on; empty if they cannot be had. what: for
    which they were used; sources: the SPECs that were read; marks: what a chat template writes
    around turns."""

    what: str
    sources: tuple[str, ...]
    samples: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    marks: frozenset[str] = frozenset()

    @classmethod
    def of_calibration(cls, record: CalibrationRecord, input_ids: Tensor | None) -> SeenSamples:
        """input_ids: with BOS; None if they are not known."""
        seen = cls("calibration", (preset_of(record.source).calibration,))
        return (
            seen if input_ids is None else replace(seen, samples=without_bos(input_ids, record.bos))
        )

    @classmethod
    def of_healing(cls, record: HealingRecord, tokenizer: Any, path: Path) -> SeenSamples:
        """Those that were trained on and those that were held out, drawn again. Says so where they
        cannot be, and what is not checked then. path: where the record was read."""
        options = checked(HealOptions, record.recipe, path)
        sources = tuple(preset_of(text).calibration for text in options.text)
        drawn = _healing_drawn_again(record, options, tokenizer)
        if drawn is None:
            say(
                f"The healing samples cannot be drawn from {', '.join(options.text)} again: "
                "whether texts and tasks overlap with them is not checked"
            )
            return cls("healing", sources)
        marks = ChatTemplate.of(tokenizer).marks if options.chat else frozenset[str]()
        return cls("healing", sources, without_bos(drawn, record.bos), marks)

    def refuse(self, text: Segments) -> None:
        """Raises UserError if the text is one of the sources, or overlaps with the samples."""
        if preset_of(text.source).evaluation in self.sources:
            raise UserError(f"{text.source} was used for {self.what}; evaluate on other text.")
        tokens = min(GRAM_TOKENS, self.samples.shape[1])
        overlapping = overlapping_segments(text.input_ids, self.samples, tokens)
        if overlapping:
            raise UserError(
                f"{text.source} overlaps with the {self.what} samples: {len(overlapping)} of "
                f"{len(text.input_ids)} segments share {tokens} tokens in a row with them; "
                f"evaluate on other text, or use other for {self.what}."
            )


@dataclass(frozen=True)
class CalibratedOn:
    """All that a plan was made on. texts: of the samples, words with one space between them, each
    from one document."""

    seen: tuple[SeenSamples, ...] = ()
    texts: tuple[str, ...] = ()

    @classmethod
    def of_plan(cls, plan: Path, tokenizer: Any) -> CalibratedOn:
        contents = load_plan(plan)
        input_ids = load_calibration_ids(plan, contents)
        calibration = SeenSamples.of_calibration(contents.calibration, input_ids)
        return cls._of(calibration, contents.healing, tokenizer, plan / PLAN_FILE)

    @classmethod
    def of_pruned(cls, pruned: str, tokenizer: Any) -> CalibratedOn:
        """The samples of a pruned model, drawn again if its artifact says where they came from and
        what their hash is. Says so where they cannot be, and what is not checked then."""
        path = Path(pruned) / ARTIFACT_FILE
        made = _made_on(path)
        if made is None:
            say(
                f"What {pruned} was calibrated on is not known: whether it is evaluated on that is "
                "not checked"
            )
            return cls()
        samples = _drawn_again(made.calibration, tokenizer)
        if samples is None:
            say(
                f"The calibration samples of {pruned} cannot be drawn from "
                f"{made.calibration.source} again: whether texts and tasks overlap with them is "
                "not checked (with --plan it is)"
            )
        calibration = SeenSamples.of_calibration(made.calibration, samples)
        return cls._of(calibration, made.healing, tokenizer, path)

    @classmethod
    def _of(
        cls,
        calibration: SeenSamples,
        healing: Sequence[HealingRecord],
        tokenizer: Any,
        path: Path,
    ) -> CalibratedOn:
        healed = [SeenSamples.of_healing(record, tokenizer, path) for record in healing]
        texts = [
            *_texts_of(calibration.samples.tolist(), tokenizer),
            *(text for seen in healed for text in _texts_of_healing(seen, tokenizer)),
        ]
        return cls((calibration, *healed), tuple(texts))

    def refuse(self, text: Segments) -> None:
        """Raises UserError if the text was used to make the plan."""
        for seen in self.seen:
            seen.refuse(text)


class _MadeOn(BaseModel):
    """What an artifact says of the plan that it was made by. One from before there was healing was
    not healed."""

    calibration: CalibrationRecord
    healing: list[HealingRecord] = []


def _made_on(path: Path) -> _MadeOn | None:
    """None if there is no such file, as for a server, or it says nothing that is understood."""
    if not path.exists():
        return None
    try:
        return _MadeOn.model_validate(read_json_object(path)["plan"])
    except (KeyError, TypeError, ValidationError):
        return None


def _texts_of(pieces: Iterable[Sequence[int]], tokenizer: Any) -> Iterator[str]:
    for piece in pieces:
        # A piece may begin or end within a character of several bytes.
        text = tokenizer.decode(piece, skip_special_tokens=True).strip("\ufffd")
        if words := text.split():
            yield " ".join(words)


def _texts_of_healing(seen: SeenSamples, tokenizer: Any) -> Iterator[str]:
    for text in _texts_of(_pieces(seen, tokenizer), tokenizer):
        for mark in seen.marks:
            text = text.removeprefix(f"{mark} ").removesuffix(f" {mark}")
        yield text


def _pieces(seen: SeenSamples, tokenizer: Any) -> Iterator[list[int]]:
    """What samples have of one document each, of a conversation of one turn, where it is long
    enough to know it by."""
    special = special_ids(tokenizer)
    for sample in seen.samples.tolist():
        for ends, piece in groupby(sample, lambda token: token in special):
            tokens = list(piece)
            if not ends and len(tokens) >= GRAM_TOKENS:
                yield tokens


def _healing_drawn_again(
    record: HealingRecord, options: HealOptions, tokenizer: Any
) -> Tensor | None:
    """The samples (N, T) from texts, BOS included, and the questions that the dense model answered;
    None if a text is not there any more, or is another."""
    try:
        samples = options.mixture.open(tokenizer)
        drawn = samples.draw(record.drawn_before + record.samples)
        asked = _questions_again(options, tokenizer)
    except UserError:
        return None
    if samples.sha256 != record.sha256:
        return None
    parts = [part for part in (drawn, samples.held_out, asked) if len(part)]
    return torch.cat(parts) if parts else torch.empty(0, options.tokens, dtype=torch.int64)


def _questions_again(options: HealOptions, tokenizer: Any) -> Tensor:
    """(N, T), a question each, with EOS behind it. What the dense model wrote itself is of no
    document, nor are the few tokens that it begins with where it answers none."""
    if options.written is None or not options.chat:
        return torch.empty(0, options.tokens, dtype=torch.int64)
    asked = prompts_of(options, tokenizer)
    eos = tokenizer.eos_token_id
    return torch.tensor(
        [
            question + (options.tokens - len(question)) * [question[-1] if eos is None else eos]
            for question in asked
        ]
    )


def _drawn_again(record: CalibrationRecord, tokenizer: Any) -> Tensor | None:
    """The samples (N, T), BOS included; None if the text is not there any more, or is another."""
    try:
        drawn = build_calibration(
            tokenizer, record.source, record.samples, record.tokens, record.seed
        )
    except UserError:
        return None
    return drawn.input_ids if drawn.sha256 == record.sha256 else None


def overlapping_segments(segments: Tensor, samples: Tensor, tokens: int) -> set[int]:
    """Indices of the consecutive segments (S, T) of a text that share `tokens` tokens in a row with
    a sample (N, T'), be it across a border between segments."""
    length, text = segments.shape[1], segments.flatten().tolist()
    # samples may be far more than what is evaluated on
    of_samples = chain.from_iterable(_grams(sample.tolist(), tokens) for sample in samples)
    known = set(_grams(text, tokens)).intersection(of_samples)
    shared = [start for start, gram in enumerate(_grams(text, tokens)) if gram in known]
    first_to_last = (range(start // length, (start + tokens - 1) // length + 1) for start in shared)
    return set(chain.from_iterable(first_to_last))


def _grams(ids: Sequence[int], tokens: int) -> Iterator[tuple[int, ...]]:
    return zip(*(ids[offset:] for offset in range(tokens)), strict=False)
