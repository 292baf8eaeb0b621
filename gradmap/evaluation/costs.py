"""How long an evaluation takes, by the tokens of its texts and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from gradmap.costs.footprint import RUNTIME_BYTES, model_bytes
from gradmap.costs.steps import Hardware
from gradmap.costs.timing import generation_seconds
from gradmap.evaluation.prompts import NEW_TOKENS, PROMPTS
from gradmap.model.shape import Shape

# Of each task, besides the model's work: to load it once, and what the harness does for each model.
# Seven tasks of ten documents took 6 s so (benchmarks.evaluation, in float32 against bfloat16), and
# their data 10 s to load.
TASK_LOADING_S, TASK_S = 1.5, 1.0

# lm-evaluation-harness and its data sets in memory: SmolLM2's evaluation takes 2.0 GB with tasks.
HARNESS_BYTES = 0.7e9


@dataclass(frozen=True)
class Documents:
    """A task's validation set: how many documents, and for each, tokens in a pass and tokens that
    are predicted."""

    count: int
    tokens: float
    predicted: float


# With SmolLM2's tokenizer, 100 documents each; the answers to a question share one pass over it.
PAPER_TASKS = {
    "boolq": Documents(3270, 138, 2),
    "piqa": Documents(1838, 58, 46),
    "hellaswag": Documents(10042, 168, 120),
    "winogrande": Documents(1267, 42, 11),
    "arc_easy": Documents(570, 37, 17),
    "arc_challenge": Documents(299, 49, 22),
    "openbookqa": Documents(500, 22, 15),
}


@dataclass(frozen=True)
class EvaluationSize:
    """How much is evaluated. texts: how many; segment: tokens of a segment; limit: segments of each
    text, and documents of each task."""

    texts: int = 0
    segment: int = 128
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    answers: bool = False


def evaluation_seconds(
    shape: Shape, hardware: Hardware, size: EvaluationSize, layer_counts: Sequence[int]
) -> float | None:
    """Seconds to evaluate models of `layer_counts` layers, one after the other. None where a text,
    or a task that is not the paper's, is not limited, for how long it is is not known."""
    shape = hardware.sees(shape)
    documents = [_documents(task, size.limit) for task in size.tasks]
    if None in documents or (size.texts and size.limit is None):
        return None
    known = [task for task in documents if task is not None]
    tokens = sum(task.count * task.tokens for task in known)
    predicted = sum(task.count * task.predicted for task in known)
    of_texts = size.texts * (size.limit or 0) * size.segment
    seconds = TASK_LOADING_S * len(known)
    for layers in layer_counts:
        flops = (tokens + of_texts) * shape.layer_flops(layers)
        flops += (predicted + of_texts) * shape.head_flops
        answers_s = 0.0
        if size.answers:
            answers_s = generation_seconds(shape, hardware, NEW_TOKENS, len(PROMPTS), layers)
        seconds += flops / hardware.sustained_flops + answers_s + TASK_S * len(known)
    return seconds


def evaluation_bytes(shape: Shape, hardware: Hardware, size: EvaluationSize) -> float:
    """Bytes of memory at the peak; one model is loaded once, and pruned in memory."""
    return RUNTIME_BYTES + model_bytes(shape, hardware) + (HARNESS_BYTES if size.tasks else 0.0)


def _documents(task: str, limit: int | None) -> Documents | None:
    """The documents of a task that are evaluated; one that is not the paper's has as many tokens as
    these on average. None if how many there are is not known."""
    known = PAPER_TASKS.get(task)
    if known is not None:
        return Documents(min(known.count, limit or known.count), known.tokens, known.predicted)
    if limit is None:
        return None
    tokens = fmean(paper.tokens for paper in PAPER_TASKS.values())
    predicted = fmean(paper.predicted for paper in PAPER_TASKS.values())
    return Documents(limit, tokens, predicted)
