"""What a model answers to a fixed set of prompts: numbers can look fine where the text has fallen
apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradmap.common.console import say
from gradmap.evaluation.backends import Question, ScoreRequest
from gradmap.evaluation.prompts import NEW_TOKENS, PROMPTS
from gradmap.evaluation.scoring import Scorer

N_GRAM = 4


@dataclass(frozen=True)
class Answer:
    """An answer, and how many tokens it has. repetition: the share of its 4-grams of tokens that
    occurred before (seq-rep-4, Welleck et al. 2020). ended: whether the model ended it, and not the
    limit of NEW_TOKENS."""

    text: str
    tokens: int
    repetition: float
    ended: bool


@dataclass(frozen=True)
class Written:
    """What a model wrote to PROMPTS. prompts, answers: token ids, without the token that ends."""

    prompts: list[list[int]]
    answers: list[list[int]]

    @property
    def requests(self) -> list[ScoreRequest]:
        """Asks how likely each answer is behind its prompt; one without tokens is left out."""
        pairs = zip(self.prompts, self.answers, strict=True)
        return [ScoreRequest(tuple(prompt), tuple(answer)) for prompt, answer in pairs if answer]


def write_answers(scorer: Scorer, tokenizer: Any) -> Written | None:
    """Greedy answers to PROMPTS, asked through the tokenizer's chat template if it has one. None if
    the model takes too few tokens, which is said."""
    prompts = [_encode(tokenizer, prompt) for prompt in PROMPTS]
    needed = max(map(len, prompts)) + NEW_TOKENS
    if needed > scorer.backend.max_tokens:
        say(
            f"The fixed prompts and their answers have up to {needed} tokens, and the model takes "
            f"{scorer.backend.max_tokens}: they are left out"
        )
        return None
    questions = [Question(tuple(prompt), NEW_TOKENS) for prompt in prompts]
    return Written(prompts, scorer.answer(questions, "Answering the fixed prompts"))


def describe_answers(written: Written, tokenizer: Any) -> list[Answer]:
    """The answers for people, in the order of PROMPTS."""
    return [
        Answer(
            text=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            tokens=len(tokens),
            repetition=repeated_share(tokens),
            ended=len(tokens) < NEW_TOKENS,
        )
        for tokens in written.answers
    ]


def repeated_share(tokens: Sequence[int]) -> float:
    """The share of an answer's 4-grams of tokens that occurred before; 0 if it has none."""
    grams = [tuple(tokens[start : start + N_GRAM]) for start in range(len(tokens) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summarise_answers(answers: Sequence[Answer]) -> dict[str, float]:
    """The fields of gradmap.evaluation.result.AnswersRecord."""
    lengths = [answer.tokens for answer in answers]
    return {
        "empty": _mean([not answer.text for answer in answers]),
        "repetition": _mean([answer.repetition for answer in answers]),
        "ended": _mean([answer.ended for answer in answers]),
        "median_tokens": float(np.median(lengths)),
        "p90_tokens": float(np.quantile(lengths, 0.9)),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(prompt))
