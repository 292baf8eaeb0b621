"""Examples before a question, drawn by lm-evaluation-harness from where a task says."""

from __future__ import annotations

from typing import Any

from gradmap.common.console import say
from gradmap.common.errors import UserError

# The harness's own (lm_eval.simple_evaluate), so that the examples are those that it draws.
SEED = 1234


def set_few_shot(name: str, task: Any, asked: int | None) -> None:
    """Sets how many examples stand before each question of a task of the harness.

    asked: None takes what its definition says. A task that is defined to have none stays so, as in
    the harness. Raises UserError if there are no documents for examples, or too few, or they are
    those that are evaluated.
    """
    own = task.get_config("num_fewshot")
    count = own if asked is None or own == 0 else asked
    if own == 0 and asked:
        say(f"{name} is defined to have no examples, and has none")
    task.set_config("num_fewshot", count or 0)
    if count:
        _require_examples(name, task, count)


def few_shot_of(task: Any) -> int:
    """How many examples stand before each question."""
    return int(task.get_config("num_fewshot") or 0)


def draw_from_the_start(task: Any) -> None:
    """Makes the next evaluation draw the same examples as the last one: what is drawn depends on
    what was drawn before."""
    task.set_fewshot_seed(SEED)


def _require_examples(name: str, task: Any, count: int) -> None:
    if _may_meet_itself(task):
        raise UserError(
            f"Task {name} would have {count} examples before each question, and there are no "
            "documents for them but those that are evaluated; give --few-shot 0, or save the "
            "split that examples come from too (docs/evaluating.md)."
        )
    available = len(task.sampler.fewshot_docs())
    if available < count:
        raise UserError(
            f"Task {name} has {available} documents to take examples from; give --few-shot "
            f"{available} or fewer."
        )


def _may_meet_itself(task: Any) -> bool:
    """Whether a question may be among its own examples. The harness takes it out only where the
    definition says that examples come from the test split."""
    config, of_examples = task.config, task.fewshot_cfg
    evaluated = config.test_split or config.validation_split
    if of_examples.split is not None:
        return bool(of_examples.split == evaluated != config.test_split)
    if of_examples.samples is not None:
        return False
    source = config.training_split or config.validation_split or config.test_split
    return bool(source == evaluated)
