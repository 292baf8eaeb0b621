"""Has any backend score, or answer, any number of requests: with progress, and kept on disk as it
goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gradmap.common.console import progress
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite
from gradmap.evaluation.backends import Backend, IsDone, Question, Score, ScoreRequest, never
from gradmap.evaluation.kept_results import (
    ANSWERS,
    SCORES,
    KeptResults,
    Request,
    Result,
)

# Requests between two writes to disk: what a crash can cost. Answers take longer.
CHUNK_REQUESTS = 512
CHUNK_QUESTIONS = 64


@dataclass(frozen=True)
class Scorer:
    """A backend and where its scores and answers are kept.

    identity: what they depend on besides the requests (hashes of the model, dtype, runtime); None
    for a model that cannot be identified (a URL), of which nothing is kept. label: for the
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

        def compute(chunk: Sequence[ScoreRequest]) -> list[Score]:
            scores = self.backend.score(chunk)
            for score in scores:
                require_finite(f"{description}: what the model predicts", score.log_likelihood)
            return scores

        kept = KeptResults.of(SCORES, self.identity, distinct)
        scores = self._kept_or_new(kept, distinct, scored_together, compute, description)
        return [scores[request] for request in requests]

    def answer(
        self,
        questions: Sequence[Question],
        description: str,
        is_done: Callable[[Question], IsDone] = lambda question: never,
    ) -> list[list[int]]:
        """The greedy answers to the questions, token ids, in their order. is_done: of what has the
        limits of a question."""
        distinct = list(dict.fromkeys(questions))

        def compute(chunk: Sequence[Question]) -> list[list[int]]:
            prompts = [question.prompt for question in chunk]
            return self.backend.generate(prompts, chunk[0].new_tokens, is_done(chunk[0]))

        identity = self.identity and {**self.identity, "ends": sorted(self.backend.end_tokens)}
        kept = KeptResults.of(ANSWERS, identity, distinct)
        answers = self._kept_or_new(kept, distinct, answered_together, compute, description)
        return [answers[question] for question in questions]

    def _kept_or_new(
        self,
        kept: KeptResults[Result],
        distinct: Sequence[Request],
        chunks: Callable[[Sequence[Request]], Iterator[Sequence[Request]]],
        compute: Callable[[Sequence[Request]], list[Result]],
        description: str,
    ) -> dict[Request, Result]:
        """The result of each request: what is kept, and what `compute` gives for the others, in
        `chunks`."""
        results = {} if self.fresh else kept.read(distinct)
        if len(results) == len(distinct):
            return results
        with (
            kept.writing(self.fresh),
            progress(f"{description}, {self.label}", len(distinct)) as advance,
        ):
            # others may have written until now
            results = kept.read(distinct)
            advance(len(results))
            for chunk in chunks([request for request in distinct if request not in results]):
                new = compute(chunk)
                kept.append(chunk, new)
                results.update(zip(chunk, new, strict=True))
                advance(len(chunk))
        return results

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


def scored_together(ordered: Sequence[ScoreRequest]) -> Iterator[Sequence[ScoreRequest]]:
    """CHUNK_REQUESTS at a time, and the rest of those that share the last one's context."""
    start = 0
    while start < len(ordered):
        end = min(start + CHUNK_REQUESTS, len(ordered))
        while end < len(ordered) and ordered[end].context == ordered[end - 1].context:
            end += 1
        yield ordered[start:end]
        start = end


def answered_together(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    """CHUNK_QUESTIONS at a time, that follow each other and have the same limits."""
    for _, group in groupby(questions, lambda asked: (asked.new_tokens, asked.stops)):
        together = list(group)
        for start in range(0, len(together), CHUNK_QUESTIONS):
            yield together[start : start + CHUNK_QUESTIONS]
