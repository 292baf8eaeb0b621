"""How a model computes, as every command that loads one asks."""

from __future__ import annotations

from pydantic import Field

from gradmap.common.reading import Strict


class ComputingOptions(Strict):
    """dtype: a name of gradmap.model.precision, or auto. device: see gradmap.model.loading."""

    dtype: str = Field(
        "auto",
        description="auto, float32, float64, bfloat16, float16, or autocast (only products in "
        "bfloat16).",
    )
    device: str = Field("auto", description="auto, cpu, cuda, or spread (over all GPUs).")
