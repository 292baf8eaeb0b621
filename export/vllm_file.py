"""vllm.yaml of a vLLM-ready directory: what a server of the model is told, unless its operator says
otherwise.

Two keys and no others: vLLM would take any of its options from such a file, among them those that
run code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from export import VLLM_CONFIG_FILE
from gradmap.common.files import write_text
from gradmap.common.reading import checked
from gradmap.common.yaml_files import read_yaml
from gradmap.model.model_files import own_file

HEADER = f"# vllm serve DIRECTORY --config DIRECTORY/{VLLM_CONFIG_FILE}\n"


class VllmFile(BaseModel):
    """served_model_name: what clients ask for. dtype: what vLLM computes in. None leaves vLLM its
    default."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        protected_namespaces=(),
    )

    served_model_name: (
        Annotated[str, Field(pattern=r"^[^\s\x00-\x1f\x7f-][^\x00-\x1f\x7f]*$")] | None
    ) = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None


def write_vllm_file(directory: Path, served_model_name: str, dtype: str) -> None:
    """Raises UserError if no server can have a model of that name."""
    settings = {"served-model-name": served_model_name, "dtype": dtype}
    checked(VllmFile, settings, directory / VLLM_CONFIG_FILE)
    write_text(directory / VLLM_CONFIG_FILE, HEADER + yaml.safe_dump(settings, sort_keys=False))


def vllm_arguments(directory: Path) -> list[str]:
    """What a model says to vLLM, as options that others may follow. Raises UserError as
    `read_vllm_file` does."""
    said = read_vllm_file(directory)
    name = ["--served-model-name", said.served_model_name or directory.resolve().name]
    return name if said.dtype is None else [*name, "--dtype", said.dtype]


def read_vllm_file(directory: Path) -> VllmFile:
    """Empty if the directory has none. Raises UserError if it says anything else than it may."""
    path = own_file(directory, VLLM_CONFIG_FILE)
    return checked(VllmFile, read_yaml(path) or {}, path) if path.exists() else VllmFile()
