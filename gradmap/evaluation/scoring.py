"""Scores any number of requests with any backend: longest first, with progress, kept on disk as it goes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from gradmap.console import progress
from gradmap.errors import UserError
from gradmap.evaluation.backends import Backend, Request, Score
from gradmap.files import cache_directory, sha256_json, write_text
from gradmap.finite import require_finite

# Requests between two writes to disk: what a crash can cost.
CHUNK_REQUESTS = 512


@dataclass(frozen=True)
class Scorer:
    """A backend and where its scores are kept.

    identity: what the scores depend on besides the requests (hashes of the model, dtype, runtime); None for a model
    that cannot be identified (a URL), whose scores are not kept. label: for the progress bar.
    """

    backend: Backend
    identity: dict[str, Any] | None
    label: str
    fresh: bool = False

    def score(self, requests: Sequence[Request], description: str) -> list[Score]:
        """Raises UserError if a request does not fit the model, or its logits are not finite."""
        distinct = order_for_scoring(requests)
        self._refuse_unfit(distinct)
        kept = _KeptScores.of(self.identity, distinct, self.fresh)
        scores = kept.read()
        with progress(f"{description}, {self.label}", len(distinct)) as advance:
            advance(len(scores))
            while len(scores) < len(distinct):
                chunk = next_chunk(distinct, len(scores))
                new = self.backend.score(chunk)
                for score in new:
                    require_finite(f"{description}: what the model predicts", score.log_likelihood)
                kept.append(new)
                scores += new
                advance(len(chunk))
        by_request = dict(zip(distinct, scores, strict=True))
        return [by_request[request] for request in requests]

    def _refuse_unfit(self, requests: Sequence[Request]) -> None:
        vocabulary = self.backend.vocabulary
        highest = max((max(request.context + request.continuation) for request in requests), default=0)
        if vocabulary is not None and highest >= vocabulary:
            raise UserError(
                f"The tokenizer makes token {highest}, but the model knows only {vocabulary}: it is another model's."
            )
        if requests and len(requests[0]) - 1 > self.backend.max_tokens:
            raise UserError(
                f"A text of {len(requests[0])} tokens is longer than the {self.backend.max_tokens} the model takes."
            )


def order_for_scoring(requests: Sequence[Request]) -> list[Request]:
    """Each request once: those that share a context together, so that it is computed once, the longest first."""
    longest: dict[tuple[int, ...], int] = {}
    for request in requests:
        longest[request.context] = max(len(request), longest.get(request.context, 0))
    return sorted(
        dict.fromkeys(requests), key=lambda request: (-longest[request.context], request.context, -len(request))
    )


def next_chunk(ordered: Sequence[Request], start: int) -> Sequence[Request]:
    """The next CHUNK_REQUESTS requests, and the rest of those that share the last one's context."""
    end = min(start + CHUNK_REQUESTS, len(ordered))
    while end < len(ordered) and ordered[end].context == ordered[end - 1].context:
        end += 1
    return ordered[start:end]


@dataclass(frozen=True)
class _KeptScores:
    """Scores in the cache directory, one line for each; the file's name says what they depend on."""

    path: Path | None

    @classmethod
    def of(cls, identity: dict[str, Any] | None, requests: Sequence[Request], fresh: bool) -> _KeptScores:
        if identity is None:
            return cls(None)
        key = sha256_json([identity, [astuple(request) for request in requests]])
        path = cache_directory() / "scores" / f"{key}.jsonl"
        if fresh:
            path.unlink(missing_ok=True)
        return cls(path)

    def read(self) -> list[Score]:
        """What is there, without a last line that a crash cut off."""
        if self.path is None or not self.path.exists():
            return []
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(self.path, whole)
        return [Score(*json.loads(line)) for line in whole.splitlines()]

    def append(self, scores: Sequence[Score]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(json.dumps(astuple(score)) + "\n" for score in scores)
            file.flush()
            os.fsync(file.fileno())
