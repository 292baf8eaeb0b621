"""What a model answers to a fixed set of prompts: numbers can look fine where the text has fallen
apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradmap.common.console import waiting
from gradmap.evaluation.backends import Backend

NEW_TOKENS = 48
N_GRAM = 4
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short email that moves a meeting from Monday to Tuesday.",
    "What is 17 plus 25?",
    "Name three animals that live in the sea.",
    "Translate into German: The train leaves at noon.",
    "Write a Python function that returns the larger of two numbers.",
    "What should I do if I cut my finger?",
)


@dataclass(frozen=True)
class Answer:
    """An answer, and how many tokens it has. repetition: the share of its 4-grams of tokens that
    occurred before (seq-rep-4, Welleck et al. 2020)."""

    text: str
    tokens: int
    repetition: float


def answer_prompts(backend: Backend, tokenizer: Any) -> list[Answer]:
    """Greedy answers to PROMPTS, asked through the tokenizer's chat template if it has one."""
    with waiting("Answering the fixed prompts"):
        answers = backend.generate([_encode(tokenizer, prompt) for prompt in PROMPTS], NEW_TOKENS)
    return [
        Answer(
            tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            len(tokens),
            repeated_share(tokens),
        )
        for tokens in answers
    ]


def repeated_share(tokens: Sequence[int]) -> float:
    """The share of an answer's 4-grams of tokens that occurred before; 0 if it has none."""
    grams = [tuple(tokens[start : start + N_GRAM]) for start in range(len(tokens) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summarise_answers(answers: Sequence[Answer]) -> dict[str, float]:
    """The fields of gradmap.evaluation.result.AnswersRecord."""
    empty = sum(not answer.text for answer in answers)
    repetition = sum(answer.repetition for answer in answers)
    return {"empty": empty / len(answers), "repetition": repetition / len(answers)}


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(prompt))
