"""eval.json, for whoever puts its numbers beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gradmap.common.errors import UserError
from gradmap.common.reading import checked, read_json_object
from gradmap.common.verdict import Verdict

# 3: segments are of joined rows in their order, and begin with BOS where the tokenizer puts one.
SCHEMA_VERSION = 3


def records_beside(result: Path) -> Path:
    """Where the raw records of an evaluation are."""
    return result.with_suffix(".records.jsonl")


class _Read(BaseModel):
    """Part of what is read of eval.json: values are of their kind, and not converted. Other keys
    may be beside it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Estimate(_Read):
    value: float
    stderr: float | None


class _Accuracy(_Estimate):
    metric: str


class _Answers(_Read):
    empty: float
    repetition: float


class _Side(_Read):
    """What one of the models is, and what was measured."""

    layers: int | None
    parameters: int | None
    perplexity: dict[str, _Estimate]
    accuracy: dict[str, _Accuracy]
    average_accuracy: _Estimate | None
    answers: _Answers | None


class _Interval(_Read):
    value: float
    low: float
    high: float


class _OfTask(_Read):
    difference: _Interval


class _OfAverage(_OfTask):
    retained: _Interval | None


class _Comparison(_Read):
    tasks: dict[str, _OfTask]
    average: _OfAverage | None
    perplexity_ratio: dict[str, _Interval]


class _Quality(_Read):
    verdict: Annotated[Verdict, Field(strict=False)]
    reason: str


class _Settings(_Read):
    segment: int


class _Task(_Read):
    documents: int


class _Answer(_Read):
    text: str


class _Answered(_Read):
    prompt: str
    dense: _Answer
    pruned: _Answer | None = None


class _Evaluation(_Read):
    model: str
    plan_sha256: str | None
    texts: dict[str, dict[str, Any]]
    tasks: dict[str, _Task]
    dense: _Side
    pruned: _Side | None = None
    comparison: _Comparison | None
    quality: _Quality | None
    answers: list[_Answered]
    settings: _Settings

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        """Whoever shows it looks up what `texts` and `tasks` name, and compares what was
        compared."""
        sides = [side for side in (self.dense, self.pruned) if side is not None]
        named = [(set(side.perplexity), set(side.accuracy)) for side in sides]
        averages: list[object] = [side.average_accuracy for side in sides]
        if self.comparison is not None:
            named.append((set(self.comparison.perplexity_ratio), set(self.comparison.tasks)))
            averages.append(self.comparison.average)
        if any(one != (set(self.texts), set(self.tasks)) for one in named) or (
            self.tasks and None in averages
        ):
            raise ValueError(
                "not all of the texts and tasks that it names were measured, or others were"
            )
        if (self.comparison is None) != (self.pruned is None) or (
            self.plan_sha256 and self.pruned is None
        ):
            raise ValueError("it lacks one of two models, or their comparison")
        if self.answers and any(side.answers is None for side in sides):
            raise ValueError("it has answers, and not what they are like")
        return self


def read_evaluation(path: Path, *, of_two: bool = False) -> dict[str, Any]:
    """The contents of eval.json. of_two: whether it has to compare two models.

    Raises UserError if it is missing, damaged, not what is wanted, or of another schema: its
    perplexities are then of other segments.
    """
    contents = read_json_object(path)
    version = contents.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has evaluation schema {version}, this version reads {SCHEMA_VERSION}: the "
            "perplexities of the two cannot be compared; evaluate again."
        )
    if checked(_Evaluation, contents, path).pruned is None and of_two:
        raise UserError(
            f"{path} is of one model, and not of a dense and a pruned one; evaluate with a plan."
        )
    return contents
