"""What evaluation asks of a model, wherever it runs. All in token ids, so that every backend sees
the same input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# Of a model whose config sets no limit, so many tokens are taken at once.
UNLIMITED_TOKENS = 2048


@dataclass(frozen=True)
class ScoreRequest:
    """Asks how likely `continuation` is after `context`, both token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class Score:
    """What a model makes of a ScoreRequest. log_likelihood: of the whole continuation, nats.
    greedy_tokens: how many of its tokens were the most likely one where they stand."""

    log_likelihood: float
    greedy_tokens: int


@dataclass(frozen=True)
class Question:
    """Asks how a model goes on behind `prompt`, token ids, greedily: by `new_tokens` at most.
    stops: texts before which the answer ends."""

    prompt: tuple[int, ...]
    new_tokens: int
    stops: tuple[str, ...] = ()


# In sentences about what is not finite.
LOGITS = "What the model predicts"

# Of the tokens of an answer so far: whether more are needless.
IsDone = Callable[[Sequence[int]], bool]


def never(answer: Sequence[int]) -> bool:
    """An IsDone for answers that only the model ends."""
    return False


class Backend(Protocol):
    """A model that runs.

    name: of the runtime. max_tokens: the longest sequence it takes. vocabulary: token ids it knows,
    if that is known.
    """

    name: str
    max_tokens: int
    vocabulary: int | None

    @property
    def end_tokens(self) -> Collection[int]:
        """Those that end an answer, where the runtime is told."""
        ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Scores requests of at most max_tokens + 1 tokens (the last one is only predicted), in any
        order."""
        ...

    def log_probabilities(self, request: ScoreRequest) -> Tensor | None:
        """The log probability, in nats, of every token (V,) in each place of a continuation of n
        tokens: (n, V), on the CPU. None where the runtime does not show it."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, is_done: IsDone = never
    ) -> list[list[int]]:
        """Continues each prompt greedily until the model ends or `new_tokens` are there; the end
        token is left out.

        What follows once an answer is done may be missing, or anything. A runtime that cannot be
        stopped goes on.
        """
        ...
