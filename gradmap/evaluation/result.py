"""eval.json: what `gradmap eval` writes, and whoever puts its numbers beside others reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from gradmap.common.errors import UserError
from gradmap.common.reading import Strict, checked_result, read_json_object
from gradmap.common.verdict import Verdict
from gradmap.evaluation.answers import Answer
from gradmap.evaluation.comparison import QualityComparison
from gradmap.evaluation.perplexity import Estimate

# 3: segments are of joined rows in their order, and begin with BOS where the tokenizer puts one.
# 4: answers to more prompts, how long they are, and how pruned follows dense's.
SCHEMA_VERSION = 4


def records_beside(result: Path) -> Path:
    """The path of an evaluation's raw records."""
    return result.with_suffix(".records.jsonl")


class TextRecord(Strict):
    """The text that perplexity was measured on (gradmap.evaluation.perplexity.Segments).

    separator: between the rows of the source. bos: the token before each segment, None if the
    tokenizer puts none. sha256: of the token ids, (segments, tokens).
    """

    source: str
    separator: str
    segments: int
    tokens: int
    bos: int | None
    predicted_tokens: int
    sha256: str


class TaskRecord(Strict):
    """The task that accuracy was measured on. left_out: documents that were used for calibration.
    few_shot: examples before each question, the most of any part of a group. chat: whether it was
    asked through the chat template."""

    source: str
    versions: list[str]
    documents: int
    left_out: int
    few_shot: int
    chat: bool

    @property
    def asked(self) -> str:
        """How its questions were put, in words: zero-shot, 5-shot, 5-shot chat."""
        shots = f"{self.few_shot}-shot" if self.few_shot else "zero-shot"
        return f"{shots} chat" if self.chat else shots


@dataclass(frozen=True)
class Accuracy(Estimate):
    """The metric that stands for a task, and all that it has, by name."""

    metric: str
    metrics: dict[str, Estimate]


class AnswersRecord(Strict):
    """What a model's answers are like. empty: the share without text. repetition: mean over the
    answers. ended: the share that the model ended, and not the limit. median_tokens, p90_tokens: of
    their lengths."""

    empty: float
    repetition: float
    ended: float
    median_tokens: float
    p90_tokens: float


class Side(Strict):
    """One of the models, and what was measured of it. None is what is not known of a server, or was
    not asked for."""

    layers: int | None
    parameters: int | None
    backend: str
    dtype: str | None
    perplexity: dict[str, Estimate]
    accuracy: dict[str, Accuracy]
    average_accuracy: Estimate | None
    answers: AnswersRecord | None


class QualityRecord(Strict):
    """The gate's verdict, and its limits (gradmap.evaluation.options.QualityOptions)."""

    verdict: Verdict
    reason: str
    max_average_drop: float | None
    max_perplexity_ratio: float | None


class AnsweredRecord(Strict):
    """One of the fixed prompts. pruned: absent where one model was evaluated."""

    prompt: str
    dense: Answer
    pruned: Answer | None = None


class SettingsRecord(Strict):
    """What the evaluation was limited to. limit: of segments and documents, None for all. segment:
    its tokens, without BOS."""

    limit: int | None
    seed: int
    segment: int


class Evaluation(Strict):
    """The contents of eval.json.

    pruned: absent where one model was evaluated; comparison and quality are None then. quality:
    None without a gate. answers: empty if none were asked for. environment: name -> text.
    """

    schema_version: int
    model: str
    plan_sha256: str | None
    texts: dict[str, TextRecord]
    tasks: dict[str, TaskRecord]
    dense: Side
    pruned: Side | None = None
    comparison: QualityComparison | None
    quality: QualityRecord | None
    answers: list[AnsweredRecord]
    settings: SettingsRecord
    environment: dict[str, str]

    def contents(self) -> dict[str, Any]:
        """The evaluation as it is written: without what is absent."""
        return self.model_dump(mode="json", exclude_unset=True)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        """Refuses an evaluation with parts missing: whoever shows it looks up what `texts` and
        `tasks` name, and compares what was compared."""
        if any(named != (set(self.texts), set(self.tasks)) for named in self._named()):
            raise ValueError(
                "not all of the texts and tasks that it names were measured, or others were"
            )
        averages = [side.average_accuracy for side in self._sides()]
        compared = self.comparison
        if self.tasks and (None in averages or (compared is not None and compared.average is None)):
            raise ValueError(
                "not all of the texts and tasks that it names were measured, or others were"
            )
        lacks_pruned = self.plan_sha256 is not None and self.pruned is None
        if (compared is None) != (self.pruned is None) or lacks_pruned:
            raise ValueError("it lacks one of two models, or their comparison")
        if self.answers and any(side.answers is None for side in self._sides()):
            raise ValueError("it has answers, and not what they are like")
        return self

    def _sides(self) -> list[Side]:
        return [side for side in (self.dense, self.pruned) if side is not None]

    def _named(self) -> list[tuple[set[str], set[str]]]:
        """The texts and tasks of each model, and of the comparison."""
        named = [(set(side.perplexity), set(side.accuracy)) for side in self._sides()]
        if self.comparison is not None:
            named.append((set(self.comparison.perplexity_ratio), set(self.comparison.tasks)))
        return named


def read_evaluation(path: Path, *, of_two: bool = False) -> Evaluation:
    """The contents of eval.json. of_two: whether it has to compare two models.

    Raises UserError if it is missing, damaged, not what is wanted, or of another schema.
    """
    contents = read_json_object(path)
    version = contents.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has evaluation schema {version}, this version reads {SCHEMA_VERSION}, and the "
            "two cannot be compared; evaluate again."
        )
    evaluation = checked_result(Evaluation, contents, path, "evaluate again")
    if evaluation.pruned is None and of_two:
        raise UserError(
            f"{path} is of one model, and not of a dense and a pruned one; evaluate with a plan."
        )
    return evaluation
