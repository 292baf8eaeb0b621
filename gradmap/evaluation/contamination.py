"""What a plan was calibrated on is not evaluated on: texts that overlap are refused, and tasks leave documents out.

Texts overlap where they share 13 tokens in a row, as GPT-3's evaluation sets and training texts were compared (Brown et
al. 2020, arXiv 2005.14165, appendix C). There it was words; tokens need no spaces between words, and are about nine
English words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmap.calibration import without_bos
from gradmap.errors import UserError
from gradmap.evaluation.perplexity import Segments
from gradmap.plan import load_calibration_ids, load_plan
from gradmap.texts import preset_of

GRAM_TOKENS = 13


@dataclass(frozen=True)
class CalibratedOn:
    """source: the SPEC that was read, None without a plan. samples: (N, T) token ids without BOS. texts: the samples as
    text, words with one space between them."""

    source: str | None
    samples: Tensor
    texts: tuple[str, ...]

    @classmethod
    def of(cls, plan: Path | None, tokenizer: Any) -> CalibratedOn:
        if plan is None:
            return cls(None, torch.empty(0, 0, dtype=torch.int64), ())
        contents = load_plan(plan)
        samples = without_bos(load_calibration_ids(plan, contents), contents.calibration.bos)
        decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in samples.tolist()]
        # A window may begin or end within a character of several bytes.
        texts = (" ".join(text.strip("\ufffd").split()) for text in decoded)
        return cls(preset_of(contents.calibration.source).calibration, samples, tuple(text for text in texts if text))

    def refuse(self, text: Segments) -> None:
        """Raises UserError if the text is the calibration's source, or overlaps with its samples."""
        if preset_of(text.source).evaluation == self.source:
            raise UserError(f"{text.source} was used for calibration; evaluate on other text.")
        tokens = min(GRAM_TOKENS, self.samples.shape[1])
        overlapping = overlapping_segments(text.input_ids, self.samples, tokens)
        if overlapping:
            raise UserError(
                f"{text.source} overlaps with the calibration samples: {len(overlapping)} of {len(text.input_ids)} "
                f"segments share {tokens} tokens in a row with them; evaluate on other text, or calibrate on other."
            )


def overlapping_segments(segments: Tensor, samples: Tensor, tokens: int) -> set[int]:
    """Which of consecutive segments (S, T) of a text share so many tokens in a row with a sample (N, T'), be it across
    a border between segments."""
    known = {gram for sample in samples.tolist() for gram in _grams(sample, tokens)}
    length = segments.shape[1]
    shared = [start for start, gram in enumerate(_grams(segments.flatten().tolist(), tokens)) if gram in known]
    return {segment for start in shared for segment in range(start // length, (start + tokens - 1) // length + 1)}


def _grams(ids: Sequence[int], tokens: int) -> Iterator[tuple[int, ...]]:
    return zip(*(ids[offset:] for offset in range(tokens)), strict=False)
