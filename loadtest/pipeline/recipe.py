"""The recipe: everything `gradmap run` does, in one YAML file. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from gradmap.common.errors import UserError
from gradmap.common.reading import Strict, checked, read_yaml
from gradmap.pruning.settings import SEEDS
from loadtest.arrivals import Arrivals
from loadtest.prompts import LEAST_OUTPUT_TOKENS
from loadtest.slo import parse_slo

AtLeastTwo = Annotated[int, Field(ge=2)]


def _written_slo(text: str) -> str:
    try:
        parse_slo(text)
    except UserError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return text


class _Section(Strict):
    """A section's fields are named as the options of the command it is for; None leaves the command
    its default."""


class PruneSection(_Section):
    calibration: str
    remove: PositiveInt | None = None
    ratio: float | None = None
    preset: str | None = None
    selector: str | None = None
    compensator: str | None = None
    accept: str | None = None
    held_out: NonNegativeInt | None = None
    layers: str | None = None
    protect_first: NonNegativeInt | None = None
    protect_last: NonNegativeInt | None = None
    top_z: PositiveInt | None = None
    side: str | None = None
    target: str | None = None
    unregularised: bool | None = None
    one_shot: bool | None = None
    samples: AtLeastTwo | None = None
    tokens: AtLeastTwo | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    dtype: str | None = None
    device: str | None = None
    stream: bool | None = None
    budget_minutes: PositiveFloat | None = None


class ExportSection(_Section):
    """How the pruned model is exported, and the dense one in vLLM's format."""

    formats: list[str] = Field(default=["hf", "vllm"])
    dtype: str | None = None
    quantise: str | None = None
    min_agreement: float | None = None
    shard_size_gb: float | None = None
    check_vllm: bool = True

    @model_validator(mode="after")
    def _serves(self) -> Self:
        if "vllm" not in self.formats:
            raise ValueError("formats must include vllm, which the load test serves")
        return self


class EvalSection(_Section):
    perplexity: dict[str, str] = Field(default={})
    segment: AtLeastTwo | None = None
    tasks: list[str] = Field(default=[])
    task_data: str | None = None
    answers: bool | None = None
    limit: PositiveInt | None = None
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None

    @model_validator(mode="after")
    def _evaluates(self) -> Self:
        if not (self.perplexity or self.tasks):
            raise ValueError("there is nothing to evaluate; give perplexity or tasks")
        return self


class QualitySection(_Section):
    """The gate of the evaluation; the load test's is `loadtest.require_speedup`."""

    max_average_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    max_perplexity_ratio: PositiveFloat | None = None


class LoadTestSection(_Section):
    """The last stage: what can be known to be wrong is refused before the first one."""

    quick: bool | None = None
    require_speedup: PositiveFloat | None = None
    pairs: PositiveInt | None = None
    concurrency: list[PositiveInt] | None = None
    rate: list[PositiveFloat] | None = None
    arrivals: Arrivals | None = None
    open_loop_s: PositiveFloat | None = None
    slo: list[Annotated[str, AfterValidator(_written_slo)]] | None = None
    find_rate: bool | None = None
    against: str | None = None
    requests: PositiveInt | None = None
    prompt_tokens: PositiveInt | None = None
    output_tokens: Annotated[int, Field(ge=LEAST_OUTPUT_TOKENS)] | None = None
    length_spread: Annotated[float, Field(ge=0, lt=1)] | None = None
    shared_prefix: Annotated[int, Field(ge=0)] | None = None
    prompts: str | None = None
    processes: PositiveInt | None = None
    seed: int | None = None
    vllm_flag: list[str] | None = None


class Recipe(_Section):
    model: str
    gguf_file: str | None = None
    allow_pickle: bool | None = None
    prune: PruneSection
    export: ExportSection = ExportSection()
    eval: EvalSection
    quality: QualitySection = QualitySection()
    loadtest: LoadTestSection = LoadTestSection()

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
