"""What is being served: which plan, of which base model, in which artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.formats import FORMATS, SERVED_FORMAT
from export.integrity import read_record, refuse_code, require_files
from export.vllm_file import read_vllm_file
from gradmap.common.errors import UserError
from gradmap.common.files import ARTIFACT_FILE, sha256_file
from gradmap.model.model_files import own_file, own_files


@dataclass(frozen=True)
class Identity:
    """The model that is served, and where it is from. artifact_sha256: of gradmap.json, which holds
    the hash of every other file. All but name and weight_bytes are None for a directory that
    gradmap did not export."""

    name: str
    weight_bytes: int
    layers: int | None = None
    base_model: str | None = None
    removed_layers: tuple[int | str, ...] | None = None
    plan_sha256: str | None = None
    artifact_sha256: str | None = None


def require_model(directory: Path) -> None:
    """Raises UserError if there is no model in the directory."""
    if not own_file(directory, "config.json").exists():
        raise UserError(
            f"{directory} is no model directory (it has no config.json); export one first."
        )


@dataclass(frozen=True)
class Trust:
    """The checks that a directory must pass before it is served.

    verify: compare every file's SHA-256 with gradmap.json. artifact: it must be an artifact;
    without this, whoever removes gradmap.json turns it into a model that nothing is known of.
    expected_sha256: of gradmap.json, from elsewhere; the hashes of all other files are in it.
    """

    verify: bool = True
    artifact: bool = False
    expected_sha256: str | None = None


def identify(directory: Path, trust: Trust) -> Identity:
    """Reads gradmap.json and compares what `trust` asks for.

    Raises UserError if the directory holds no model, an artifact for another runtime, other files
    than exported, or code.
    """
    require_model(directory)
    read_vllm_file(directory)
    if not own_file(directory, ARTIFACT_FILE).exists():
        if trust.artifact or trust.expected_sha256 is not None:
            raise UserError(
                f"{directory} is no artifact (it has no {ARTIFACT_FILE}); serve one, or do not ask "
                "for it."
            )
        weights = sum(path.stat().st_size for path in own_files(directory, ["*.safetensors"]))
        return Identity(directory.resolve().name, weights)
    record = read_record(directory, trust.expected_sha256)
    refuse_code(directory)
    form = FORMATS.get(record.format)
    if form is None or not form.served:
        raise UserError(
            f"{directory} was exported as {record.format}, which vLLM does not read; use --format "
            f"{SERVED_FORMAT}."
        )
    if trust.verify:
        require_files(directory, record.files)
    plan = record.plan
    return Identity(
        name=record.name,
        weight_bytes=record.weight_bytes,
        layers=record.layers,
        base_model=record.base_model.name,
        removed_layers=tuple(pair.written for pair in plan.removal_order) if plan else (),
        plan_sha256=plan.sha256 if plan else None,
        artifact_sha256=sha256_file(directory / ARTIFACT_FILE),
    )
