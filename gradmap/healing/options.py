"""What `gradmap heal` can be asked for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gradmap.data.mixture import Mixture
from gradmap.model.options import ComputingOptions
from gradmap.pruning.settings import SEEDS

Positive = Annotated[float, Field(gt=0)]
# The highest learning rate, by what is trained: docs/healing.md has what was measured.
DEFAULT_RATES = {"low-rank": 1e-3, "full": 1e-4}


class HealOptions(ComputingOptions):
    """text: SPECs (gradmap.data.text_specs). mix: their weights, and that of what is written, the
    same for all if not given. tokens: of a sample; step_tokens: of a step of training."""

    text: list[str] = Field(
        description="Text source to train on, see gradmap/data/text_specs.py; several may be given."
    )
    mix: list[Positive] = Field(
        default=[],
        description="How much of each text, such as 3,1; as much of all if not given.",
        json_schema_extra={"cure": "give numbers above 0"},
    )
    chat: bool = Field(
        False,
        description="Render conversations (lists of turns) through the tokenizer's chat template.",
    )
    written: int | None = Field(
        None,
        ge=1,
        description="The dense model itself writes so many tokens: one more text, the last in "
        "--mix. With --chat it answers the conversations' first questions.",
    )
    writer: Literal["transformers", "vllm"] = Field(
        "transformers", description="What runs the dense model while it writes."
    )
    tokens: int = Field(128, ge=2, description="Tokens per sample, with BOS.")
    step_tokens: int = Field(1024, ge=1, description="Tokens per step of training, about.")
    budget_tokens: int | None = Field(None, ge=1, description="Train on so many tokens.")
    budget_minutes: Positive | None = Field(
        None,
        description="Train for so long.",
        json_schema_extra={"cure": "give a number above 0"},
    )
    train: Literal["low-rank", "full"] = Field(
        "low-rank",
        description="Low-rank corrections of every linear map that is left, or all of its weights.",
    )
    rank: int = Field(64, ge=1, description="Rank of low-rank corrections.")
    learning_rate: Positive | None = Field(
        None,
        description="At its highest, behind the warm-up; 1e-3 or, of all weights, 1e-4 if not "
        "given.",
        json_schema_extra={"cure": "give a number above 0"},
    )
    shard: bool = Field(
        False,
        description="Of several processes, each holds only a part of the layers' weights (FSDP2).",
    )
    held_out: int = Field(
        64, ge=1, description="So many samples are not trained on, and choose the best."
    )
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = Field(
        42,
        description="Draws the samples, and how corrections begin.",
        json_schema_extra={"cure": f"give a number from 0 to {SEEDS - 1}"},
    )
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default=[],
        description="Tell tensorboard, wandb or mlflow how training goes; several may be given.",
        json_schema_extra={"cure": "give tensorboard, wandb or mlflow"},
    )

    @model_validator(mode="after")
    def _fits_together(self) -> HealOptions:
        if len(set(self.text)) < len(self.text):
            raise ValueError("a --text is given twice; give it once, with a larger weight (--mix)")
        if self.mix and len(self.mix) != self._mixed:
            raise ValueError(
                f"--mix has {len(self.mix)} weights for {self._mixed} texts; give one for each "
                "--text, in the same order, and for --written the last"
            )
        if self.writer != "transformers" and self.written is None:
            raise ValueError(
                f"--writer {self.writer} runs the model while it writes, and it writes nothing; "
                "give --written"
            )
        if (self.budget_tokens is None) == (self.budget_minutes is None):
            raise ValueError("give --budget-tokens or --budget-minutes, one of the two")
        if self.budget_tokens is not None and self.budget_tokens < self.tokens_in_step:
            raise ValueError(
                f"--budget-tokens is {self.budget_tokens}, less than one step of "
                f"{self.tokens_in_step}; give more, or fewer --step-tokens"
            )
        return self

    @property
    def highest_rate(self) -> float:
        return self.learning_rate or DEFAULT_RATES[self.train]

    @property
    def trained_rank(self) -> int | None:
        """None where all weights are trained."""
        return self.rank if self.train == "low-rank" else None

    @property
    def of_training(self) -> dict[str, Any]:
        """What training depends on, as plans record it: not how it is watched, nor how processes
        share the weights."""
        asked = self.model_dump(mode="json", exclude={"track", "shard"})
        return asked | {"learning_rate": self.highest_rate}

    @property
    def drawing(self) -> tuple[Mixture, int | None, str]:
        """What the order of samples depends on, texts themselves aside."""
        return self.mixture, self.written, self.writer

    @property
    def samples_in_step(self) -> int:
        return max(1, self.step_tokens // self.tokens)

    @property
    def tokens_in_step(self) -> int:
        return self.samples_in_step * self.tokens

    @property
    def _mixed(self) -> int:
        return len(self.text) + (self.written is not None)

    @property
    def mixture(self) -> Mixture:
        weights = self.mix or [1.0] * self._mixed
        return Mixture(
            tuple(self.text), tuple(weights), self.tokens, self.held_out, self.seed, self.chat
        )
