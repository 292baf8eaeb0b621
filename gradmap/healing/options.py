"""What `gradmap heal` can be asked for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from gradmap.data.mixture import Mixture
from gradmap.model.options import ComputingOptions
from gradmap.pruning.settings import SEEDS

Positive = Annotated[float, Field(gt=0)]


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
    tokens: int = Field(128, ge=2, description="Tokens per sample, with BOS.")
    step_tokens: int = Field(1024, ge=1, description="Tokens per step of training, about.")
    budget_tokens: int | None = Field(None, ge=1, description="Train on so many tokens.")
    budget_minutes: Positive | None = Field(
        None,
        description="Train for so long.",
        json_schema_extra={"cure": "give a number above 0"},
    )
    rank: int = Field(64, ge=1, description="Rank of the corrections that are trained.")
    learning_rate: Positive = Field(
        1e-3,
        description="At its highest: behind the warm-up.",
        json_schema_extra={"cure": "give a number above 0"},
    )
    held_out: int = Field(
        64, ge=1, description="So many samples are not trained on, and choose the best."
    )
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = Field(
        42,
        description="Draws the samples, and how corrections begin.",
        json_schema_extra={"cure": f"give a number from 0 to {SEEDS - 1}"},
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
        if (self.budget_tokens is None) == (self.budget_minutes is None):
            raise ValueError("give --budget-tokens or --budget-minutes, one of the two")
        if self.budget_tokens is not None and self.budget_tokens < self.tokens_in_step:
            raise ValueError(
                f"--budget-tokens is {self.budget_tokens}, less than one step of "
                f"{self.tokens_in_step}; give more, or fewer --step-tokens"
            )
        return self

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
