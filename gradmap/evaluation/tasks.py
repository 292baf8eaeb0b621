"""Tasks of lm-evaluation-harness, on data from the hub or on data sets saved on disk.

Offline, a task is the harness's own definition with another source of documents: prompts, targets,
metrics and versions stay the harness's.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from gradmap.common.console import say, waiting
from gradmap.common.errors import UserError, first_line
from gradmap.evaluation.few_shot import draw_from_the_start, few_shot_of, set_few_shot
from gradmap.evaluation.saved_data import SAVED_DATA, saved_data_of, saved_overrides
from gradmap.evaluation.scoring import Scorer

PAPER = "paper"
PAPER_TASKS = (
    "boolq",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
# The one that stands for a task, the first it has; the paper's tables hold acc_norm where a task
# has it. Of tasks that generate, the strict one.
TASK_METRICS = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc", "em", "contains")


@dataclass(frozen=True)
class Asking:
    """How questions are put. few_shot: examples before each; None for as many as the harness's
    definition says. chat: through the tokenizer's chat template, an example being a turn."""

    few_shot: int | None = None
    chat: bool = False


@dataclass(frozen=True)
class LoadedTask:
    """A task by the name the user gave it, which may stand for several of the harness's (mmlu).

    parts: name -> the harness's task object. documents: name -> the indices of the documents to
    evaluate. left_out: how many documents were used for calibration, and are not evaluated. chat:
    as of Asking.
    """

    name: str
    parts: dict[str, Any]
    documents: dict[str, list[int]]
    left_out: int
    source: str
    chat: bool = False

    def describe(self) -> dict[str, Any]:
        """The fields of gradmap.evaluation.result.TaskRecord."""
        return {
            "source": self.source,
            "versions": sorted({str(part.VERSION) for part in self.parts.values()}),
            "documents": sum(map(len, self.documents.values())),
            "left_out": self.left_out,
            "few_shot": max(map(few_shot_of, self.parts.values())),
            "chat": self.chat,
        }


@dataclass(frozen=True)
class TaskScores:
    """What a task measured. values: metric -> one value per document, in the order of `documents`
    (harness task name and index)."""

    documents: tuple[tuple[str, int], ...]
    values: dict[str, tuple[float, ...]]

    @property
    def metric(self) -> str:
        """The metric that stands for the task."""
        return next(name for name in (*TASK_METRICS, *self.values) if name in self.values)


def expand_names(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that names stand for, without repetition: paper, mmlu -> the paper's seven and
    mmlu."""
    expanded: list[str] = []
    for name in names:
        expanded += PAPER_TASKS if name == PAPER else [name]
    return tuple(dict.fromkeys(expanded))


def require_tasks(names: Sequence[str]) -> None:
    """Raises UserError if the harness has no task of one of these names, or is not installed; loads
    no data."""
    # The harness takes its time to list what it has.
    for name in names:
        if name not in PAPER_TASKS:
            _expand(name)


def load_task(
    name: str,
    data: Path | None,
    limit: int | None,
    seed: int,
    calibration_texts: Sequence[str] = (),
    asking: Asking = Asking(),
) -> LoadedTask:
    """Loads a task (or group or tag) of the harness and chooses its documents, at random if there
    is a limit.

    data: the directory of saved data sets; None takes the harness's own source, the hub.
    Raises UserError if the harness has no such task, or its data is missing or of another shape, or
    it cannot be asked so.
    """
    with waiting(f"Loading task {name}"):
        parts = {part: _load_part(part, data) for part in _expand(name)}
        for part, task in parts.items():
            set_few_shot(part, task, asking.few_shot)
        usable = {part: _usable(task, calibration_texts) for part, task in parts.items()}
    left_out = sum(len(task.eval_docs) - len(usable[part]) for part, task in parts.items())
    if not any(usable.values()):
        raise UserError(
            f"Task {name} has no documents to evaluate ({left_out} were used for calibration)."
        )
    documents = _draw(name, usable, limit, seed)
    source = "hub" if data is None else str(data / saved_data_of(name).folder)
    return LoadedTask(name, parts, documents, left_out, source, asking.chat)


def score_task(task: LoadedTask, scorer: Scorer, tokenizer: Any) -> TaskScores:
    """Evaluates the chosen documents. Raises UserError if the task has no metric that is a number
    per document."""
    from gradmap.evaluation.harness_model import HarnessModel

    return score_task_with(task, HarnessModel(scorer, tokenizer, task.name))


def score_task_with(task: LoadedTask, model: Any) -> TaskScores:
    """`score_task` with any model of the harness (lm_eval.api.model.LM)."""
    from lm_eval.evaluator import evaluate

    documents = {part: indices for part, indices in task.documents.items() if indices}
    for part in documents:
        draw_from_the_start(task.parts[part])
    # Without the harness's caches, which are pickles that anybody may have left.
    with waiting(f"Evaluating {task.name}"):
        results = evaluate(
            model,
            {"tasks": {part: task.parts[part] for part in documents}},
            samples=documents,
            bootstrap_iters=0,
            apply_chat_template=task.chat,
            fewshot_as_multiturn=task.chat,
        )
    found = {part: results["samples"][part] for part in documents}
    samples = [
        (part, sample)
        for part in found
        for sample in _extracted(found[part], _ways(found[part])[0])
    ]
    values = _numbers_by_metric([sample for _, sample in samples])
    values |= _numbers_of_other_ways(list(found.values()))
    if not values:
        raise UserError(
            f"Task {task.name} has no metric that is one number per document; it cannot be "
            "compared."
        )
    return TaskScores(tuple((part, sample["doc_id"]) for part, sample in samples), values)


def _ways(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ways in which answers were extracted from what was generated (the harness's filters): the
    first is the strictest, and stands for the task."""
    return list(dict.fromkeys(sample["filter"] for sample in samples))


def _extracted(samples: Sequence[Mapping[str, Any]], way: str) -> list[Mapping[str, Any]]:
    return [sample for sample in samples if sample["filter"] == way]


def _numbers_of_other_ways(
    parts: Sequence[Sequence[Mapping[str, Any]]],
) -> dict[str, tuple[float, ...]]:
    """What comes out of the ways behind the first, where all parts of a task have them: by metric
    and way, as the harness writes it (exact_match,flexible-extract)."""
    numbers: dict[str, tuple[float, ...]] = {}
    for way in _ways(parts[0])[1:]:
        if all(way in _ways(part)[1:] for part in parts):
            samples = [sample for part in parts for sample in _extracted(part, way)]
            of_way = _numbers_by_metric(samples)
            numbers |= {f"{metric},{way}": values for metric, values in of_way.items()}
    return numbers


def _numbers_by_metric(samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
    """metric -> one number per sample, of the metrics that are numbers throughout."""
    numbers = {}
    for metric in samples[0]["metrics"]:
        values = [sample[metric] for sample in samples]
        if all(isinstance(value, Real) for value in values):
            numbers[metric] = tuple(map(float, values))
    return numbers


@cache
def _manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "Tasks need lm-evaluation-harness; install it: pip install 'gradmap[eval]'."
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def _expand(name: str) -> list[str]:
    """The harness's tasks that a name stands for: itself, or the members of a group or tag."""
    index = _manager().task_index
    if name not in index:
        raise UserError(
            f"lm-evaluation-harness has no task {name!r}; the paper's are {', '.join(PAPER_TASKS)}."
        )
    entry = index[name]
    if entry.kind.name == "TAG":
        members: Iterable[str] = entry.tags
    elif entry.kind.name == "GROUP":
        members = [
            member if isinstance(member, str) else member["task"] for member in entry.cfg["task"]
        ]
    else:
        return [name]
    return [part for member in sorted(members) for part in _expand(member)]


def _load_part(name: str, data: Path | None) -> Any:
    overrides = {} if data is None else saved_overrides(name, data)
    # Members of a group may override what the harness's definition says.
    group = {"group": "gradmap", "task": [{"task": name, **overrides}]}
    try:
        (task,) = _manager().load([group])["tasks"].values()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"Task {name} needs a package that lm-evaluation-harness does not bring: {error}; "
            "install it with pip."
        ) from None
    # The hub's client raises errors of all kinds, and the harness over data that is not the task's.
    except Exception as error:
        if data is not None:
            raise UserError(
                f"{data / saved_data_of(name).folder} is not what task {name} needs: "
                f"{_reason(error)}."
            ) from None
        raise UserError(
            f"The data of task {name} could not be fetched from the hub ({first_line(error)}); "
            f"offline, give --task-data DIR with saved data sets (known: {', '.join(SAVED_DATA)}, "
            "mmlu)."
        ) from None
    return task


def require_answerable(task: LoadedTask) -> None:
    """Raises UserError if a document to evaluate is none of the task's: the harness would break
    down over it after hours, or count it as wrong. Takes some milliseconds each; data of the hub is
    the harness's own."""
    if task.source == "hub":
        return
    with waiting(f"Looking at the documents of {task.name}"):
        for part, indices in task.documents.items():
            _require_documents(part, task.parts[part], indices)


def _require_documents(name: str, task: Any, indices: Sequence[int]) -> None:
    # A task that processes its documents does so whenever it is asked for them.
    documents = task.eval_docs
    for index in indices:
        try:
            document = documents[index]
            task.doc_to_text(document)
            target = task.doc_to_target(document)
            choices = (
                task.doc_to_choice(document) if task.OUTPUT_TYPE == "multiple_choice" else None
            )
        # A template or a function of the harness may raise anything.
        except Exception as error:
            raise UserError(
                f"Document {index} of task {name} is not what the task needs: {_reason(error)}."
            ) from None
        if choices is not None and not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"Document {index} of task {name} has an answer that is no text.")
        if choices is not None and (
            target is None or (isinstance(target, int) and not 0 <= target < len(choices))
        ):
            raise UserError(
                f"Document {index} of task {name} has {len(choices)} answers, and its label is "
                f"{target}."
            )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _usable(task: Any, calibration_texts: Sequence[str]) -> list[int]:
    """Indices of the documents that were not used for calibration."""
    return [
        index
        for index, document in enumerate(task.eval_docs)
        if not _is_known(document, calibration_texts)
    ]


def _is_known(document: Mapping[str, Any], calibration_texts: Sequence[str]) -> bool:
    """Whether a column of the document holds one of the calibration texts."""
    columns = [" ".join(value.split()) for value in document.values() if isinstance(value, str)]
    return any(text in column for text in calibration_texts for column in columns)


def _draw(
    name: str, usable: dict[str, list[int]], limit: int | None, seed: int
) -> dict[str, list[int]]:
    everything = [(part, index) for part, indices in usable.items() for index in indices]
    if limit is None or limit >= len(everything):
        return usable
    chosen = set(random.Random(seed).sample(everything, limit))
    say(f"{name}: {limit} of {len(everything)} documents, drawn with seed {seed}")
    drawn = {}
    for part, indices in usable.items():
        drawn[part] = [index for index in indices if (part, index) in chosen]
    return drawn
