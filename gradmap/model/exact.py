"""A model is read whole and exactly, or refused: its weight files hold what its config describes,
and nothing else.

transformers gives tensors that it does not find random values, passes over those that it does not
know, and logs both.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from gradmap.common.errors import UserError, first_line

# Of tensors, in a sentence that names them.
SHOWN = 3


def require_exact(directory: Path, name: str) -> None:
    """Raises UserError if transformers cannot build the model that config.json describes, or if the
    weight files lack tensors of it, have others, or have some in another shape. Reads their headers
    only.

    name: of the model, for the error.
    """
    from transformers import AutoModelForCausalLM

    try:
        _, report = AutoModelForCausalLM.from_pretrained(
            directory,
            device_map={"": "meta"},  # where tensors have shapes and no values
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported
            output_loading_info=True,
        )
    except Exception as error:  # whatever a config can make transformers raise
        reason = first_line(error)
        raise UserError(
            f"{name} cannot be built as its config.json describes it: {reason}"
        ) from None
    refuse_inexact(report, name)


def refuse_inexact(report: dict[str, Any], name: str) -> None:
    """Raises UserError if transformers' report on what it loaded (output_loading_info) tells of any
    difference."""
    shapes = [
        f"{tensor} {(*found,)} instead of {(*wanted,)}"
        for tensor, found, wanted in report["mismatched_keys"]
    ]
    differences = [
        ("lack", report["missing_keys"]),
        ("also hold", report["unexpected_keys"]),
        ("have in another shape", shapes),
    ]
    found = [f"{verb} {_some(tensors)}" for verb, tensors in differences if tensors]
    if found:
        raise UserError(
            f"The weight files of {name} are not what its config.json describes: they "
            f"{'; they '.join(found)}. Fetch the model again, or save it with save_pretrained; "
            "quantised, compiled or wrapped weights are not read."
        )


def _some(tensors: Collection[str]) -> str:
    first = ", ".join(sorted(tensors)[:SHOWN])
    return first if len(tensors) <= SHOWN else f"{first} and {len(tensors) - SHOWN} more"
