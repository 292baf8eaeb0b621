"""`gradmap eval`: what one model is worth, or two on the same documents, and the verdict of the
gate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradmap.common.environment import describe_environment
from gradmap.common.errors import UserError
from gradmap.common.files import sha256_file, write_json, write_text
from gradmap.common.outputs import output_file
from gradmap.evaluation.agreement import Followed, Reference, follow, make_reference
from gradmap.evaluation.answers import (
    Answer,
    describe_answers,
    summarise_answers,
    write_answers,
)
from gradmap.evaluation.comparison import (
    Paired,
    QualityComparison,
    average_estimate,
    compare,
    judge_quality,
    mean_estimate,
)
from gradmap.evaluation.contamination import CalibratedOn
from gradmap.evaluation.evaluated_models import EvaluatedModel, Opened
from gradmap.evaluation.options import NO_GATE, EvalOptions, QualityOptions
from gradmap.evaluation.perplexity import Segments, perplexity_of_losses, segment_losses
from gradmap.evaluation.prompts import PROMPTS
from gradmap.evaluation.result import (
    SCHEMA_VERSION,
    Accuracy,
    AnsweredRecord,
    AnswersRecord,
    Evaluation,
    QualityRecord,
    SettingsRecord,
    Side,
    TaskRecord,
    TextRecord,
    records_beside,
)
from gradmap.evaluation.scoring import Scorer
from gradmap.evaluation.tasks import (
    Asking,
    LoadedTask,
    TaskScores,
    expand_names,
    load_task,
    require_answerable,
    score_task,
)
from gradmap.model.loading import load_tokenizer
from gradmap.pruning.plan import PLAN_FILE

ARMS = ("dense", "pruned")


@dataclass(frozen=True)
class MeasuredAnswers:
    """What a model wrote to the fixed prompts, and how it follows the reference: what the dense
    model wrote."""

    answers: list[Answer]
    reference: Reference
    followed: Followed


@dataclass(frozen=True)
class Measured:
    """What was measured of one model. losses: text -> (S,) nats per token. accuracies: task ->
    values per document. answers: None if none were asked for.

    dtype: what it computed in, if that is known.
    """

    layers: int | None
    parameters: int | None
    backend: str
    dtype: str | None
    losses: dict[str, np.ndarray[Any, Any]]
    accuracies: dict[str, TaskScores]
    answers: MeasuredAnswers | None


def evaluate(
    models: Sequence[EvaluatedModel],
    tokenizer_directory: Path,
    options: EvalOptions,
    out: Path,
    *,
    gate: QualityOptions = NO_GATE,
    fresh: bool = False,
    plan: Path | None = None,
    pruned: str | None = None,
) -> Evaluation:
    """Evaluates the dense model and, if there is a second one, the pruned one; writes `out` and
    the raw records.

    gate: what is judged. fresh: whether scores of earlier runs are ignored. plan, pruned: what the
    second one is. What it was calibrated on is not evaluated on. Returns the contents of `out`.
    Raises UserError if there is nothing to evaluate, or a text was used for calibration; what was
    scored until then is kept in the cache.
    """
    _refuse_empty(options, gate, len(models))
    with output_file(out):
        return _evaluate(models, tokenizer_directory, options, out, gate, fresh, plan, pruned)


def _evaluate(
    models: Sequence[EvaluatedModel],
    tokenizer_directory: Path,
    options: EvalOptions,
    out: Path,
    gate: QualityOptions,
    fresh: bool,
    plan: Path | None,
    pruned: str | None,
) -> Evaluation:
    tokenizer = load_tokenizer(tokenizer_directory)
    calibration = _calibrated_on(plan, pruned, tokenizer)
    texts = [
        Segments.read(tokenizer, name, source, options.segment, options.limit)
        for name, source in options.perplexity.items()
    ]
    for text in texts:
        calibration.refuse(text)
    if options.chat and not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of {tokenizer_directory} has no chat template; leave out --chat."
        )
    asking = Asking(options.few_shot, options.chat)
    tasks = [
        load_task(name, options.task_data, options.limit, options.seed, calibration.texts, asking)
        for name in expand_names(options.tasks)
    ]
    for task in tasks:
        require_answerable(task)
    measured: dict[str, Measured] = {}
    for arm, evaluated in zip(ARMS, models, strict=False):
        with evaluated.open() as opened:
            scorer = Scorer(opened.backend, evaluated.identity, arm, fresh)
            answers = None
            if options.answers:
                dense = measured.get("dense")
                reference = dense.answers.reference if dense and dense.answers else None
                answers = _measure_answers(scorer, tokenizer, reference)
            measured[arm] = _measure(opened, scorer, tokenizer, texts, tasks, answers)
    write_text(records_beside(out), _records(measured))
    comparison = _compare(measured) if len(measured) == len(ARMS) else None
    sides = {arm: _describe(side) for arm, side in measured.items()}
    text_records = {text.name: TextRecord(**text.describe()) for text in texts}
    task_records = {task.name: TaskRecord(**task.describe()) for task in tasks}
    evaluation = Evaluation(
        schema_version=SCHEMA_VERSION,
        model=models[0].name,
        plan_sha256=None if plan is None else sha256_file(plan / PLAN_FILE),
        texts=text_records,
        tasks=task_records,
        **sides,
        comparison=comparison,
        quality=None if comparison is None else _judge(comparison, measured, gate),
        answers=_side_by_side(measured),
        settings=SettingsRecord(limit=options.limit, seed=options.seed, segment=options.segment),
        environment=describe_environment(),
    )
    write_json(out, evaluation.contents())
    return evaluation


def _calibrated_on(plan: Path | None, pruned: str | None, tokenizer: Any) -> CalibratedOn:
    if plan is not None:
        return CalibratedOn.of_plan(plan, tokenizer)
    return CalibratedOn() if pruned is None else CalibratedOn.of_pruned(pruned, tokenizer)


def _refuse_empty(options: EvalOptions, gate: QualityOptions, models: int) -> None:
    if not (options.perplexity or options.tasks or options.answers):
        raise UserError(
            "There is nothing to evaluate; give --perplexity SPEC or --tasks NAMES, or leave out "
            "--no-answers."
        )
    if gate != NO_GATE and models < len(ARMS):
        raise UserError("A gate compares two models; give --plan or --pruned.")
    if gate.max_average_drop is not None and not options.tasks:
        raise UserError("--max-average-drop is about the average accuracy; give --tasks.")
    if (options.chat or options.few_shot) and not options.tasks:
        raise UserError("--chat and --few-shot are about tasks; give --tasks NAMES.")
    if gate.max_perplexity_ratio is not None and not options.perplexity:
        raise UserError("--max-perplexity-ratio is about perplexity; give --perplexity.")


def _measure(
    opened: Opened,
    scorer: Scorer,
    tokenizer: Any,
    texts: Sequence[Segments],
    tasks: Sequence[LoadedTask],
    answers: MeasuredAnswers | None,
) -> Measured:
    losses = {text.name: segment_losses(scorer, text) for text in texts}
    accuracies = {task.name: score_task(task, scorer, tokenizer) for task in tasks}
    return Measured(
        layers=opened.layers,
        parameters=opened.parameters,
        backend=opened.backend.name,
        dtype=opened.dtype,
        losses=losses,
        accuracies=accuracies,
        answers=answers,
    )


def _measure_answers(
    scorer: Scorer, tokenizer: Any, reference: Reference | None
) -> MeasuredAnswers | None:
    """reference: None of the dense model, whose own answers become it. None where the model takes
    too few tokens."""
    written = write_answers(scorer, tokenizer)
    if written is None:
        return None
    answers = describe_answers(written, tokenizer)
    if reference is None:
        return MeasuredAnswers(answers, *make_reference(written, scorer))
    return MeasuredAnswers(answers, reference, follow(reference, scorer))


def _describe(measured: Measured) -> Side:
    accuracies = {name: _accuracy_of(scores) for name, scores in measured.accuracies.items()}
    perplexities = {name: perplexity_of_losses(losses) for name, losses in measured.losses.items()}
    answers = measured.answers
    return Side(
        layers=measured.layers,
        parameters=measured.parameters,
        backend=measured.backend,
        dtype=measured.dtype,
        perplexity=perplexities,
        accuracy=accuracies,
        average_accuracy=average_estimate(accuracies) if accuracies else None,
        answers=None if answers is None else AnswersRecord(**summarise_answers(answers.answers)),
    )


def _accuracy_of(scores: TaskScores) -> Accuracy:
    metrics = {name: mean_estimate(np.array(values)) for name, values in scores.values.items()}
    main = metrics[scores.metric]
    return Accuracy(main.value, main.stderr, scores.metric, metrics)


def _judge(
    comparison: QualityComparison, measured: Mapping[str, Measured], gate: QualityOptions
) -> QualityRecord | None:
    """The verdict of the gate; None if it asks for nothing."""
    dense = measured["dense"]
    documents = {name: len(scores.documents) for name, scores in dense.accuracies.items()}
    segments = {name: len(losses) for name, losses in dense.losses.items()}
    judgement = judge_quality(comparison, gate, documents, segments)
    if judgement is None:
        return None
    return QualityRecord(verdict=judgement.verdict, reason=judgement.reason, **gate.model_dump())


def _side_by_side(measured: Mapping[str, Measured]) -> list[AnsweredRecord]:
    """The prompts with every model's answer; none if they were not asked for."""
    answers = {arm: side.answers.answers for arm, side in measured.items() if side.answers}
    if not answers:
        return []
    return [
        AnsweredRecord(prompt=prompt, **{arm: given[row] for arm, given in answers.items()})
        for row, prompt in enumerate(PROMPTS)
    ]


def _compare(measured: Mapping[str, Measured]) -> QualityComparison:
    """Compares pruned with dense, document by document and segment by segment."""
    dense, pruned = (measured[arm] for arm in ARMS)
    accuracies = {}
    for name, scores in dense.accuracies.items():
        other = pruned.accuracies[name]
        assert scores.documents == other.documents
        accuracies[name] = Paired(
            np.array(scores.values[scores.metric]), np.array(other.values[scores.metric])
        )
    losses = {name: Paired(own, pruned.losses[name]) for name, own in dense.losses.items()}
    followed = None
    if dense.answers and pruned.answers:
        followed = (dense.answers.followed, pruned.answers.followed)
    return compare(accuracies, losses, followed)


def _records(measured: Mapping[str, Measured]) -> str:
    """One JSON line for each segment, document and followed answer of each model: everything the
    statistics are made of."""
    lines = []
    for arm, side in measured.items():
        for name, losses in side.losses.items():
            lines += [
                {"arm": arm, "text": name, "segment": row, "loss": loss}
                for row, loss in enumerate(losses.tolist())
            ]
        for name, scores in side.accuracies.items():
            for row, (part, document) in enumerate(scores.documents):
                values = {metric: values[row] for metric, values in scores.values.items()}
                lines.append(
                    {"arm": arm, "task": name, "part": part, "document": document, **values}
                )
        if side.answers is not None:
            lines += [{"arm": arm, **line} for line in side.answers.followed.describe()]
    return "".join(json.dumps(line) + "\n" for line in lines)
