"""What a plan was calibrated on is not evaluated on: texts that overlap are refused, and tasks
leave documents out.

Texts overlap where they share 13 tokens in a row, as GPT-3's evaluation sets and training texts
were compared (Brown et al. 2020, arXiv 2005.14165, appendix C). There it was words; tokens need no
spaces between words, and are about nine English words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from gradmap.common.console import say
from gradmap.common.errors import UserError
from gradmap.common.files import ARTIFACT_FILE
from gradmap.common.reading import read_json_object
from gradmap.data.calibration import build_calibration, without_bos
from gradmap.data.text_specs import preset_of
from gradmap.evaluation.perplexity import Segments
from gradmap.pruning.plan import CalibrationRecord, load_calibration_ids, load_plan

GRAM_TOKENS = 13


@dataclass(frozen=True)
class CalibratedOn:
    """What a plan was calibrated on. source: the SPEC that was read, None if that is not known.
    samples: (N, T) token ids without BOS. texts: the samples as text, words with one space between
    them."""

    source: str | None = None
    samples: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    texts: tuple[str, ...] = ()

    @classmethod
    def of_plan(cls, plan: Path, tokenizer: Any) -> CalibratedOn:
        contents = load_plan(plan)
        return cls._of_samples(
            contents.calibration, load_calibration_ids(plan, contents), tokenizer
        )

    @classmethod
    def of_pruned(cls, pruned: str, tokenizer: Any) -> CalibratedOn:
        """The samples of a pruned model, drawn again if its artifact says where they came from and
        what their hash is. Says so where they cannot be, and what is not checked then."""
        record = _calibration_of_artifact(Path(pruned) / ARTIFACT_FILE)
        if record is None:
            say(
                f"What {pruned} was calibrated on is not known: whether it is evaluated on that is "
                "not checked"
            )
            return cls()
        samples = _drawn_again(record, tokenizer)
        if samples is None:
            say(
                f"The calibration samples of {pruned} cannot be drawn from {record.source} again: "
                "whether texts and tasks overlap with them is not checked (with --plan it is)"
            )
            return cls(preset_of(record.source).calibration)
        return cls._of_samples(record, samples, tokenizer)

    @classmethod
    def _of_samples(
        cls, record: CalibrationRecord, input_ids: Tensor, tokenizer: Any
    ) -> CalibratedOn:
        samples = without_bos(input_ids, record.bos)
        decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in samples.tolist()]
        # A window may begin or end within a character of several bytes.
        texts = (" ".join(text.strip("\ufffd").split()) for text in decoded)
        return cls(
            preset_of(record.source).calibration, samples, tuple(text for text in texts if text)
        )

    def refuse(self, text: Segments) -> None:
        """Raises UserError if the text is the calibration's source, or overlaps with its
        samples."""
        if preset_of(text.source).evaluation == self.source:
            raise UserError(f"{text.source} was used for calibration; evaluate on other text.")
        tokens = min(GRAM_TOKENS, self.samples.shape[1])
        overlapping = overlapping_segments(text.input_ids, self.samples, tokens)
        if overlapping:
            raise UserError(
                f"{text.source} overlaps with the calibration samples: {len(overlapping)} of "
                f"{len(text.input_ids)} segments share {tokens} tokens in a row with them; "
                "evaluate on other text, or calibrate on other."
            )


def _calibration_of_artifact(path: Path) -> CalibrationRecord | None:
    """What an artifact's record says of its calibration; None if there is no such file, as for a
    server, or it says nothing that is understood."""
    if not path.exists():
        return None
    try:
        return CalibrationRecord.model_validate(read_json_object(path)["plan"]["calibration"])
    except (KeyError, TypeError, ValidationError):
        return None


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
    known = {gram for sample in samples.tolist() for gram in _grams(sample, tokens)}
    length = segments.shape[1]
    shared = [
        start
        for start, gram in enumerate(_grams(segments.flatten().tolist(), tokens))
        if gram in known
    ]
    first_to_last = (range(start // length, (start + tokens - 1) // length + 1) for start in shared)
    return set(chain.from_iterable(first_to_last))


def _grams(ids: Sequence[int], tokens: int) -> Iterator[tuple[int, ...]]:
    return zip(*(ids[offset:] for offset in range(tokens)), strict=False)
