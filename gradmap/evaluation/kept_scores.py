"""Scores on disk, so that an evaluation that was interrupted goes on: each line says which request
it answers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from gradmap.common.files import append_text, cache_directory, sha256_json
from gradmap.common.locks import writing
from gradmap.evaluation.backends import Score, ScoreRequest

# Hexadecimal digits of a request's hash: of a million requests, two are alike with a chance of
# 1e-7.
KEY_DIGITS = 16


@dataclass(frozen=True)
class KeptScores:
    """The scores in a file of the cache directory, whose name says what they depend on; none are
    kept without a path."""

    path: Path | None

    @classmethod
    def of(cls, identity: dict[str, Any] | None, requests: Sequence[ScoreRequest]) -> KeptScores:
        """The file for scores of these requests. identity: what they depend on besides; None for a
        model that cannot be identified."""
        if identity is None:
            return cls(None)
        key = sha256_json([identity, [astuple(request) for request in requests]])
        return cls(cache_directory() / "scores" / f"{key}.jsonl")

    def read(self, requests: Sequence[ScoreRequest]) -> dict[ScoreRequest, Score]:
        """The scores that are kept of these requests. A line that a crash cut off, or that is
        damaged, is left out."""
        if self.path is None or not self.path.exists():
            return {}
        by_key = {request_key(request): request for request in requests}
        answers = map(_parse_line, self.path.read_bytes().splitlines())
        return {by_key[key]: score for key, score in filter(None, answers) if key in by_key}

    @contextmanager
    def writing(self, fresh: bool) -> Iterator[None]:
        """Waits until nobody else scores the same, who may have scored it all by then. fresh: drops
        what is there."""
        if self.path is None:
            yield
            return
        with writing(self.path, wait=True):
            if fresh:
                self.path.unlink(missing_ok=True)
            yield

    def append(self, requests: Sequence[ScoreRequest], scores: Sequence[Score]) -> None:
        """Adds scores to the file: all of them, or none if the disk is full."""
        if self.path is None:
            return
        lines = [
            json.dumps([request_key(request), *astuple(score)])
            for request, score in zip(requests, scores, strict=True)
        ]
        cut = "\n" if _ends_within_a_line(self.path) else ""
        append_text(self.path, cut + "".join(f"{line}\n" for line in lines))


def request_key(request: ScoreRequest) -> str:
    """A request's hash, by which the file finds its score."""
    return sha256_json(astuple(request))[:KEY_DIGITS]


def _parse_line(line: bytes) -> tuple[str, Score] | None:
    try:
        key, log_likelihood, greedy_tokens = json.loads(line)
    except (ValueError, TypeError):
        return None
    if [type(key), type(log_likelihood), type(greedy_tokens)] != [str, float, int]:
        return None
    return (key, Score(log_likelihood, greedy_tokens)) if math.isfinite(log_likelihood) else None


def _ends_within_a_line(path: Path) -> bool:
    """Whether a crash has cut the last line of a file off."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
