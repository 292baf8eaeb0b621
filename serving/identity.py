"""What is being served: which plan, of which base model, in which artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.integrity import read_record, require_files
from gradmap.errors import UserError
from gradmap.files import ARTIFACT_FILE, sha256_file


@dataclass(frozen=True)
class Identity:
    """artifact_sha256: of gradmap.json, which holds the hash of every other file. All but name and weight_bytes are
    None for a directory that gradmap did not export."""

    name: str
    weight_bytes: int
    layers: int | None = None
    base_model: str | None = None
    removed_layers: tuple[int, ...] | None = None
    plan_sha256: str | None = None
    artifact_sha256: str | None = None


def require_model(directory: Path) -> None:
    """Raises UserError if there is no model in the directory."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is no model directory (it has no config.json); export one first.")


def identify(directory: Path, verify: bool) -> Identity:
    """Reads gradmap.json, and with `verify` compares every file's SHA-256 with it.

    Raises UserError if the directory holds no model, an artifact for another runtime, or other files than exported.
    """
    require_model(directory)
    if not (directory / ARTIFACT_FILE).is_file():
        weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        return Identity(directory.resolve().name, weights)
    record = read_record(directory)
    if record["format"] not in ("hf", "vllm"):
        raise UserError(f"{directory} was exported as {record['format']}, which vLLM does not read; use --format vllm.")
    if verify:
        require_files(directory, record["files"])
    plan = record["plan"]
    return Identity(
        name=record["name"],
        weight_bytes=record["weight_bytes"],
        layers=record["layers"],
        base_model=record["base_model"]["name"],
        removed_layers=tuple(plan["removal_order"]) if plan else (),
        plan_sha256=plan["sha256"] if plan else None,
        artifact_sha256=sha256_file(directory / ARTIFACT_FILE),
    )
