"""The recipe: everything `gradmap run` does, in one YAML file. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple, Self

from pydantic import Field, model_validator

from export.formats import SERVED_FORMAT
from export.options import ExportOptions
from gradmap.common.options import Name
from gradmap.common.reading import Strict, checked
from gradmap.common.yaml_files import read_yaml
from gradmap.evaluation.options import EvalOptions, QualityOptions
from gradmap.healing.options import HealOptions
from gradmap.pruning.settings import PruneOptions
from loadtest.options import LoadTestOptions


class PruneSection(PruneOptions):
    """Here the calibration texts have to be named."""

    calibration: str


class Turn(NamedTuple):
    """Removal until so many layers are gone, or all that are to go, and healing behind it."""

    removed: int | None

    @property
    def suffix(self) -> str:
        """Of the names of its stages."""
        return "" if self.removed is None else f"-{self.removed}"


class HealSection(HealOptions):
    """schedule: the counts at which removal waits for the model to be healed."""

    schedule: list[Annotated[int, Field(ge=1)]] = Field(
        default=[],
        description="Heal the model when so many layers are gone, and remove on from what it has "
        "become; the budget is shared equally, with what heals the last one.",
    )

    @model_validator(mode="after")
    def _can_be_shared(self) -> Self:
        if self.schedule != sorted(set(self.schedule)):
            raise ValueError("schedule must name each count once, the lowest first")
        parts = len(self.turns)
        if self.budget_tokens is not None and self.budget_tokens < parts * self.tokens_in_step:
            raise ValueError(
                f"the budget of {self.budget_tokens} tokens is shared by {parts} healings, less "
                f"than a step of {self.tokens_in_step} for each; give more, or a shorter schedule"
            )
        return self

    @property
    def turns(self) -> list[Turn]:
        return [*map(Turn, self.schedule), Turn(None)]

    @property
    def of_each(self) -> HealOptions:
        """Of every healing."""
        parts = len(self.turns)
        asked = self.model_dump(exclude_unset=True, exclude={"schedule"})
        if self.budget_tokens is not None:
            asked["budget_tokens"] = self.budget_tokens // parts
        if self.budget_minutes is not None:
            asked["budget_minutes"] = self.budget_minutes / parts
        return HealOptions(**asked)


class ExportSection(ExportOptions):
    """Of the pruned model and, to be served beside it, of the dense one."""

    formats: list[Name] = Field(default=["hf", SERVED_FORMAT])

    @model_validator(mode="after")
    def _serves(self) -> Self:
        if SERVED_FORMAT not in self.formats:
            raise ValueError(f"formats must include {SERVED_FORMAT}, which the load test serves")
        return self


class EvalSection(EvalOptions):
    """Something has to be evaluated."""

    @model_validator(mode="after")
    def _evaluates(self) -> Self:
        if not (self.perplexity or self.tasks):
            raise ValueError("there is nothing to evaluate; give perplexity or tasks")
        return self


class Recipe(Strict):
    """Each section has the options of the command that it is for; what is left out is the command's
    default. Without `heal`, the plan is not healed."""

    model: str
    gguf_file: str | None = None
    allow_pickle: bool | None = None
    prune: PruneSection
    heal: HealSection | None = None
    export: ExportSection = ExportSection()
    eval: EvalSection
    quality: QualityOptions = QualityOptions()
    loadtest: LoadTestOptions = LoadTestOptions()

    @model_validator(mode="after")
    def _measures_what_is_gated(self) -> Self:
        if self.quality.max_average_drop is not None and not self.eval.tasks:
            raise ValueError("quality.max_average_drop needs eval.tasks")
        if self.quality.max_perplexity_ratio is not None and not self.eval.perplexity:
            raise ValueError("quality.max_perplexity_ratio needs eval.perplexity")
        return self


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe; raises UserError that names the key at fault."""
    return checked(Recipe, read_yaml(path), path)
