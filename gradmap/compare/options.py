"""What `gradmap compare` can be asked for."""

from __future__ import annotations

from pydantic import Field

from gradmap.common.options import Name
from gradmap.common.reading import Strict
from gradmap.evaluation.options import EvaluatedOn
from gradmap.model.options import ComputingOptions
from gradmap.pruning.settings import CalibrationOptions


class _Compared(Strict):
    methods: list[Name] = Field(
        description="SELECTOR+COMPENSATOR, with commas: repair+distil,sleb+none."
    )
    remove: list[int] = Field(description="How many layers to remove, with commas: 4,8,12.")
    seeds: list[int] = Field(
        [42], description="Draw the calibration samples, with commas: 42,43,44."
    )


class _EvaluatedIn(EvaluatedOn):
    perplexity: dict[str, str] = Field(
        description="[NAME=]SPEC of a text; may be given several times."
    )
    eval_dtype: str = Field("auto", description="What is evaluated in, as --dtype.")


class CompareOptions(_EvaluatedIn, ComputingOptions, CalibrationOptions, _Compared):
    """Options of `gradmap compare`: every method at every count with every seed, under one
    calibration and one evaluation."""
