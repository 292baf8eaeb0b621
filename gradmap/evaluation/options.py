"""What `gradmap eval` can be asked for, on the command line and in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from gradmap.common.options import Name
from gradmap.common.reading import Strict
from gradmap.data.text_specs import named_sources
from gradmap.model.options import ComputingOptions

SEGMENT_TOKENS = 128


class EvaluatedOn(Strict):
    """perplexity: texts by name, each a SPEC (gradmap.data.text_specs). tasks: names of
    lm-evaluation-harness."""

    perplexity: dict[str, str] = Field(
        default_factory=dict, description="[NAME=]SPEC of a text; may be given several times."
    )
    segment: int = Field(SEGMENT_TOKENS, ge=2, description="Tokens of a segment of text.")
    tasks: list[Name] = Field(
        default_factory=list,
        description="Tasks of lm-evaluation-harness: piqa,arc_easy,…; paper: the paper's seven.",
    )
    task_data: Path | None = Field(
        None,
        description="Directory of saved data sets; without it, tasks are fetched from the hub.",
    )
    few_shot: int | None = Field(
        None,
        ge=0,
        description="Examples before each question of a task; by default, as the task says.",
    )
    chat: bool = Field(
        False, description="Ask the questions of tasks through the tokenizer's chat template."
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="So many first segments of each text, and documents of each task.",
    )

    @field_validator("perplexity", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, list) and all(isinstance(text, str) for text in given):
            return named_sources(given)
        return given


class _Asked(Strict):
    answers: bool = Field(
        True,
        description="Answer fixed prompts, and see whether pruned would write what dense writes.",
    )
    seed: int = Field(0, description="Draws the documents of tasks.")


class EvalOptions(ComputingOptions, _Asked, EvaluatedOn):
    """Options of `gradmap eval`, on the command line and in a recipe."""


class QualityOptions(Strict):
    """The gate of an evaluation."""

    max_average_drop: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="Gate: how far the average accuracy may drop (0.05 is five points).",
        json_schema_extra={"cure": "give a share from 0 to 1 (five points are 0.05)"},
    )
    max_perplexity_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Gate: how many times higher each perplexity may become.",
        json_schema_extra={"cure": "give a finite number above 0"},
    )


NO_GATE = QualityOptions()
