"""Whether an artifact is what was exported: its record, gradmap.json, and the SHA-256 of every
file."""

from __future__ import annotations

from pathlib import Path

from export.comparison import LogitComparison
from gradmap.common.console import waiting
from gradmap.common.errors import UserError
from gradmap.common.files import ARTIFACT_FILE, sha256_file
from gradmap.common.reading import Strict, checked_result, read_json_object
from gradmap.model.model_files import CODE_KEY, PlainName, own_file, own_files
from gradmap.model.sublayers import Pair
from gradmap.pruning.plan import CalibrationRecord, HealingRecord

SCHEMA_VERSION = 5


class BaseRecord(Strict):
    """Which checkpoint the artifact was made of. files: name -> SHA-256."""

    name: str
    files: dict[PlainName, str]
    license: str | None


class PlanRecord(Strict):
    """The plan that was applied: original layer indices, and the records of plan.json of what it
    was calibrated and healed on."""

    sha256: str
    removal_order: list[Pair]
    corrected_layers: list[int]
    calibration: CalibrationRecord
    healing: list[HealingRecord]


class ArtifactRecord(Strict):
    """The contents of gradmap.json.

    format, dtype and quantise are those of export.formats. calibration: what quantisation was
    calibrated on, but for the samples that it was judged on; None if it looked at none.
    verification: what was found when it was exported, by runtime. files: name -> SHA-256 of every
    other file.
    """

    schema_version: int
    name: str
    format: str
    dtype: str
    quantise: str | None
    calibration: CalibrationRecord | None
    layers: int
    parameters: int
    weight_bytes: int
    base_model: BaseRecord
    plan: PlanRecord | None
    verification: dict[str, LogitComparison]
    environment: dict[str, str]
    files: dict[PlainName, str]


def read_record(directory: Path, expected_sha256: str | None = None) -> ArtifactRecord:
    """Returns the contents of gradmap.json.

    expected_sha256: of that file, where it is known from elsewhere; whoever can change the
    directory can change the hashes in it as well. Raises UserError if there is none, one of another
    version, a damaged or another one.
    """
    path = own_file(directory, ARTIFACT_FILE)
    contents = read_json_object(path)
    version = contents.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} is of another version of gradmap: it has artifact schema {version}, this "
            f"version reads {SCHEMA_VERSION}; export the artifact again."
        )
    if expected_sha256 is not None and sha256_file(path) != expected_sha256.lower():
        raise UserError(
            f"{path} is not the one that is expected: its SHA-256 is {sha256_file(path)}."
        )
    return checked_result(ArtifactRecord, contents, path, "export the artifact again")


def require_files(directory: Path, hashes: dict[str, str]) -> None:
    """Raises UserError unless the directory holds exactly the files of `hashes` (hidden ones
    aside), unchanged."""
    present = list_files(directory)
    for name, expected in hashes.items():
        if name not in present:
            raise UserError(f"{directory} lacks {name}; fetch the artifact again.")
        with waiting(f"Hashing {directory / name}"):
            found = sha256_file(directory / name)
        if found != expected:
            raise UserError(
                f"{directory / name} is not what was exported (its SHA-256 differs); fetch it "
                "again."
            )
    if foreign := sorted(present - hashes.keys()):
        raise UserError(f"{directory / foreign[0]} is not part of the artifact; remove it.")


def refuse_code(directory: Path) -> None:
    """Raises UserError if files of an artifact are programs, or name some: nothing that gradmap
    exports needs any."""
    if programs := own_files(directory, ["**/*.py"]):
        raise UserError(
            f"{programs[0]} is a program, which no artifact of gradmap has; do not trust this "
            "directory."
        )
    for path in own_files(directory, ["*.json"]):
        if path.name.endswith("config.json") and CODE_KEY in read_json_object(path):
            raise UserError(
                f"{path} names code to run ({CODE_KEY}), which no artifact of gradmap does; do not "
                "trust it."
            )


def list_files(directory: Path) -> set[str]:
    """The names of an artifact's files, relative to it, without hidden ones and its record."""
    names = {str(path.relative_to(directory)) for path in own_files(directory, ["**/*"])}
    return {name for name in names if not name.startswith(".")} - {ARTIFACT_FILE}
