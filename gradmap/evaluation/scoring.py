"""Scores any number of requests with any backend: longest first, with progress, kept on disk as it
goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradmap.common.console import progress
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite
from gradmap.evaluation.backends import Backend, Score, ScoreRequest
from gradmap.evaluation.kept_scores import KeptScores

# Requests between two writes to disk: what a crash can cost.
CHUNK_REQUESTS = 512


@dataclass(frozen=True)
class Scorer:
    """A backend and where its scores are kept.

    identity: what the scores depend on besides the requests (hashes of the model, dtype, runtime);
    None for a model that cannot be identified (a URL), whose scores are not kept. label: for the
    progress bar.
    """

    backend: Backend
    identity: dict[str, Any] | None
    label: str
    fresh: bool = False

    def score(self, requests: Sequence[ScoreRequest], description: str) -> list[Score]:
        """The scores of the requests, in their order. Raises UserError if one does not fit the
        model, or its logits are not finite."""
        distinct = order_for_scoring(requests)
        self._refuse_unfit(distinct)
        kept = KeptScores.of(self.identity, distinct)
        scores = {} if self.fresh else kept.read(distinct)
        if len(scores) < len(distinct):
            with kept.writing(self.fresh):
                # Others may have written until now.
                scores = kept.read(distinct)
                self._score_rest(distinct, scores, kept, description)
        return [scores[request] for request in requests]

    def _score_rest(
        self,
        distinct: Sequence[ScoreRequest],
        scores: dict[ScoreRequest, Score],
        kept: KeptScores,
        description: str,
    ) -> None:
        """Adds to `scores` what is missing."""
        rest = [request for request in distinct if request not in scores]
        done = 0
        with progress(f"{description}, {self.label}", len(distinct)) as advance:
            advance(len(scores))
            while done < len(rest):
                chunk = next_chunk(rest, done)
                new = self.backend.score(chunk)
                for score in new:
                    require_finite(f"{description}: what the model predicts", score.log_likelihood)
                kept.append(chunk, new)
                scores.update(zip(chunk, new, strict=True))
                done += len(chunk)
                advance(len(chunk))

    def _refuse_unfit(self, requests: Sequence[ScoreRequest]) -> None:
        vocabulary = self.backend.vocabulary
        highest = max(
            (max(request.context + request.continuation) for request in requests), default=0
        )
        if vocabulary is not None and highest >= vocabulary:
            raise UserError(
                f"The tokenizer makes token {highest}, but the model knows only {vocabulary}: it "
                "is another model's."
            )
        if requests and len(requests[0]) - 1 > self.backend.max_tokens:
            raise UserError(
                f"A text of {len(requests[0])} tokens is longer than the {self.backend.max_tokens} "
                "the model takes."
            )


def order_for_scoring(requests: Sequence[ScoreRequest]) -> list[ScoreRequest]:
    """The distinct requests: those that share a context together, so that it is computed once, the
    longest first."""
    longest: dict[tuple[int, ...], int] = {}
    for request in requests:
        longest[request.context] = max(len(request), longest.get(request.context, 0))
    return sorted(
        dict.fromkeys(requests),
        key=lambda request: (-longest[request.context], request.context, -len(request)),
    )


def next_chunk(ordered: Sequence[ScoreRequest], start: int) -> Sequence[ScoreRequest]:
    """The next CHUNK_REQUESTS requests, and the rest of those that share the last one's context."""
    end = min(start + CHUNK_REQUESTS, len(ordered))
    while end < len(ordered) and ordered[end].context == ordered[end - 1].context:
        end += 1
    return ordered[start:end]
