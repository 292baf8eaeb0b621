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
    has labels."""

    folder: str
    split: str = "validation"


SAVED_DATA = {
    "boolq": SavedData("boolq/none"),
    "piqa": SavedData("piqa/plain_text"),
    "hellaswag": SavedData("hellaswag/none"),
    "winogrande": SavedData("winogrande/winogrande_xl"),
    "arc_easy": SavedData("ai2_arc/ARC-Easy"),
    "arc_challenge": SavedData("ai2_arc/ARC-Challenge"),
    "openbookqa": SavedData("openbookqa/main"),
    "commonsense_qa": SavedData("tau/commonsense_qa/none"),
}


def saved_overrides(name: str, data: Path) -> dict[str, Any]:
    """What of the harness's definition of a task is otherwise where its data is saved below `data`.
    Raises UserError if it is not."""
    saved = saved_data_of(name)
    directory = data / saved.folder / saved.split
    if not (directory / "state.json").is_file():
        raise UserError(
            f"Task {name} has no data: {directory} is no directory written by "
            "datasets.save_to_disk."
        )
    splits = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
    return {
        **splits,
        f"{saved.split}_split": saved.split,
        "custom_dataset": lambda **_: {saved.split: _read(name, directory)},
    }


def saved_data_of(name: str) -> SavedData:
    """Where a task's data is. Raises UserError if that is not known."""
    if name == "mmlu" or name.startswith(_MMLU):
        return SavedData(f"hails/mmlu_no_train/{name.removeprefix(_MMLU)}", "test")
    if name not in SAVED_DATA:
        raise UserError(
            f"It is not known how data of task {name} is saved on disk (known: "
            f"{', '.join(SAVED_DATA)}, mmlu); leave out --task-data to fetch it from the hub."
        )
    return SAVED_DATA[name]


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
