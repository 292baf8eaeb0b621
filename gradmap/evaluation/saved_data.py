"""Data of tasks that was saved to disk, in place of what the harness would fetch from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmap.common.errors import UserError
from gradmap.common.reading import library_errors_refused

_MMLU = "mmlu_"


@dataclass(frozen=True)
class SavedData:
    """A data set written by `datasets.save_to_disk`. folder: below --task-data. split: the one that
    is evaluated, which has labels. few_shot: the one that examples come from, if it is there; None
    where the harness's definition has its own examples."""

    folder: str
    split: str = "validation"
    few_shot: str | None = "train"


# What a split is to the harness, which draws examples otherwise where it has another role.
EVALUATED_AS = {"validation": "validation_split"}
EXAMPLES_AS = {"train": "training_split"}

SAVED_DATA = {
    "boolq": SavedData("boolq/none"),
    "piqa": SavedData("piqa/plain_text"),
    "hellaswag": SavedData("hellaswag/none"),
    "winogrande": SavedData("winogrande/winogrande_xl"),
    "arc_easy": SavedData("ai2_arc/ARC-Easy"),
    "arc_challenge": SavedData("ai2_arc/ARC-Challenge"),
    "openbookqa": SavedData("openbookqa/main"),
    "commonsense_qa": SavedData("tau/commonsense_qa/none"),
    "social_iqa": SavedData("social_i_qa/none"),
    "sciq": SavedData("sciq/none"),
    "copa": SavedData("super_glue/copa"),
    "cb": SavedData("super_glue/cb"),
    "rte": SavedData("glue/rte"),
    "sst2": SavedData("glue/sst2"),
    "nq_open": SavedData("nq_open/none"),
    "triviaqa": SavedData("trivia_qa/rc.wikipedia.nocontext"),
    "gsm8k": SavedData("gsm8k/main", "test"),
    "gsm8k_cot": SavedData("gsm8k/main", "test", few_shot=None),
    "gsm8k_cot_zeroshot": SavedData("gsm8k/main", "test"),
    "hendrycks_math500": SavedData("HuggingFaceH4/MATH-500/none", "test"),
    "coqa": SavedData("coqa/none"),
    "drop": SavedData("drop/none"),
    "ifeval": SavedData("google/IFEval/none", "train"),
}


def saved_overrides(name: str, data: Path) -> dict[str, Any]:
    """What of the harness's definition of a task is otherwise where its data is saved below `data`.
    Raises UserError if it is not."""
    saved = saved_data_of(name)
    directory = data / saved.folder
    if not _is_saved(directory / saved.split):
        raise UserError(
            f"Task {name} has no data: {directory / saved.split} is no directory written by "
            "datasets.save_to_disk."
        )
    roles = {EVALUATED_AS.get(saved.split, "test_split"): saved.split}
    if saved.few_shot is not None and _is_saved(directory / saved.few_shot):
        roles[EXAMPLES_AS.get(saved.few_shot, "fewshot_split")] = saved.few_shot
    return {
        **dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split")),
        **roles,
        "custom_dataset": lambda **_: {
            split: _read(name, directory / split) for split in roles.values()
        },
    }


def saved_data_of(name: str) -> SavedData:
    """Where a task's data is. Raises UserError if that is not known."""
    if name == "mmlu" or name.startswith(_MMLU):
        return SavedData(f"hails/mmlu_no_train/{name.removeprefix(_MMLU)}", "test", "dev")
    if name not in SAVED_DATA:
        raise UserError(
            f"It is not known how data of task {name} is saved on disk (known: "
            f"{', '.join(SAVED_DATA)}, mmlu); leave out --task-data to fetch it from the hub."
        )
    return SAVED_DATA[name]


def _is_saved(directory: Path) -> bool:
    return (directory / "state.json").is_file()


def _read(name: str, directory: Path) -> Any:
    from datasets import load_from_disk

    # In memory: datasets would write what it derives beside the data, which is the user's, and the
    # input of a stage.
    with library_errors_refused(f"{directory} is damaged"):
        documents = load_from_disk(str(directory), keep_in_memory=True)
    # Saved as Google's boolq; the harness reads SuperGLUE's, whose label is a class.
    if name == "boolq":
        documents = documents.map(lambda document: {"label": int(document["answer"])})
    return documents
