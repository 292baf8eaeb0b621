"""Scores and answers on disk, so that an evaluation that was interrupted goes on: each line says
which request it answers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from gradmap.common.files import append_text, cache_directory, sha256_json
from gradmap.common.locks import writing
from gradmap.evaluation.backends import Question, Score, ScoreRequest

# Hexadecimal digits of a request's hash: of a million requests, two are alike with a chance of
# 1e-7.
KEY_DIGITS = 16

Request = TypeVar("Request", bound=ScoreRequest | Question)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Form(Generic[Result]):
    """How results of one kind are kept. directory: below the cache directory. values: of a result,
    as JSON has them; parse: the other way, None for what is damaged."""

    directory: str
    values: Callable[[Result], Sequence[Any]]
    parse: Callable[[list[Any]], Result | None]


@dataclass(frozen=True)
class KeptResults(Generic[Result]):
    """Results in a file of the cache directory, whose name says what they depend on; none are kept
    without a path."""

    form: Form[Result]
    path: Path | None

    @classmethod
    def of(
        cls,
        form: Form[Result],
        identity: dict[str, Any] | None,
        requests: Sequence[ScoreRequest | Question],
    ) -> KeptResults[Result]:
        """The file for the results of these requests. identity: what they depend on besides; None
        for a model that cannot be identified."""
        if identity is None:
            return cls(form, None)
        key = sha256_json([identity, [astuple(request) for request in requests]])
        return cls(form, cache_directory() / form.directory / f"{key}.jsonl")

    def read(self, requests: Sequence[Request]) -> dict[Request, Result]:
        """The results that are kept of these requests. A line that a crash cut off, or that is
        damaged, is left out."""
        if self.path is None or not self.path.exists():
            return {}
        by_key = {request_key(request): request for request in requests}
        found = map(self._parse_line, self.path.read_bytes().splitlines())
        return {by_key[key]: result for key, result in filter(None, found) if key in by_key}

    @contextmanager
    def writing(self, fresh: bool) -> Iterator[None]:
        """Waits until nobody else computes the same, who may have computed it all by then. fresh:
        drops what is there."""
        if self.path is None:
            yield
            return
        with writing(self.path, wait=True):
            if fresh:
                self.path.unlink(missing_ok=True)
            yield

    def append(self, requests: Sequence[Request], results: Sequence[Result]) -> None:
        """Adds results to the file: all of them, or none if the disk is full."""
        if self.path is None:
            return
        keys = map(request_key, requests)
        rows = zip(keys, map(self.form.values, results), strict=True)
        lines = [json.dumps([key, *values]) for key, values in rows]
        cut = "\n" if _ends_within_a_line(self.path) else ""
        append_text(self.path, cut + "".join(f"{line}\n" for line in lines))

    def _parse_line(self, line: bytes) -> tuple[str, Result] | None:
        try:
            key, *values = json.loads(line)
        except (ValueError, TypeError):
            return None
        parsed = self.form.parse(values)
        return (key, parsed) if isinstance(key, str) and parsed is not None else None


def request_key(request: ScoreRequest | Question) -> str:
    """A request's hash, by which the file finds its result."""
    return sha256_json(astuple(request))[:KEY_DIGITS]


def _parse_score(values: list[Any]) -> Score | None:
    if [type(value) for value in values] != [float, int] or not math.isfinite(values[0]):
        return None
    return Score(*values)


def _parse_answer(values: list[Any]) -> list[int] | None:
    return values if all(type(value) is int for value in values) else None


SCORES = Form[Score]("scores", astuple, _parse_score)
# Token ids.
ANSWERS = Form[list[int]]("answers", list, _parse_answer)


def _ends_within_a_line(path: Path) -> bool:
    """Whether a crash has cut the last line of a file off."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
