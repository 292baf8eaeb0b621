"""What `gradmap export` can be asked for, on the command line and in a recipe."""

from __future__ import annotations

from pydantic import Field

from export.comparison import MIN_AGREEMENT, Bounds
from export.format_help import dtype_help, format_help, quantise_help
from gradmap.common.options import Name
from gradmap.common.reading import Strict


class ExportOptions(Strict):
    """dtype: None for each format's default. min_agreement, max_divergence, max_perplexity_ratio:
    see export.comparison.Bounds.

    check_vllm: whether vLLM itself has to reproduce the reference (where it is installed).
    """

    formats: list[Name] = Field(description=format_help(), json_schema_extra={"flag": "--format"})
    dtype: str | None = Field(None, description=dtype_help())
    quantise: str | None = Field(None, description=quantise_help())
    min_agreement: float = Field(
        MIN_AGREEMENT,
        ge=0,
        le=1,
        description="Refuse a quantised model whose best token agrees more rarely.",
    )
    max_divergence: float | None = Field(
        None,
        gt=0,
        description="Refuse a quantised model that diverges by more nats per token from the "
        "unquantised one, in runtimes that show all logits.",
    )
    max_perplexity_ratio: float | None = Field(
        None,
        gt=0,
        description="Refuse a quantised model whose perplexity on the texts is higher than the "
        "unquantised one's by more than this factor.",
    )
    shard_size_gb: float = Field(
        5.0, ge=0.001, description="Largest size of a weight file, in 10^9 bytes."
    )
    check_vllm: bool = Field(
        True, description="Let vLLM itself reproduce the reference, where it is installed."
    )

    @property
    def of_quantised(self) -> Bounds:
        """What is asked of a quantised artifact."""
        return Bounds(
            min_agreement=self.min_agreement,
            max_divergence=self.max_divergence,
            max_perplexity_ratio=self.max_perplexity_ratio,
        )

    @property
    def shard_bytes(self) -> int:
        return int(self.shard_size_gb * 1e9)
