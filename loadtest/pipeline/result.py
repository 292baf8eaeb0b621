"""result.json: what came out of a recipe, of all its stages."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from export.comparison import LogitComparison
from export.integrity import read_record
from gradmap.common.environment import describe_environment
from gradmap.common.errors import UserError
from gradmap.common.files import ARTIFACT_FILE, sha256_file
from gradmap.common.reading import Strict, checked, read_json_object
from gradmap.common.verdict import Verdict, worst
from gradmap.evaluation.answers import Answer
from gradmap.evaluation.comparison import QualityComparison
from gradmap.evaluation.perplexity import Estimate
from gradmap.evaluation.result import (
    Accuracy,
    AnswersRecord,
    TaskRecord,
    read_evaluation,
)
from loadtest.pipeline.stages import Places
from loadtest.schema import LoadReport
from loadtest.statistics import SpeedUp

SCHEMA_VERSION = 4
RESULT_FILE = "result.json"


class Judged(Strict):
    """A gate's verdict, and the sentence that says why."""

    verdict: Verdict
    reason: str


class QualityResult(Judged):
    """The gate of the evaluation, and what it asks for."""

    max_average_drop: float | None
    max_perplexity_ratio: float | None


class LoadTestResult(Judged):
    """The part of the load test's report.json that is of the whole test. speedup: by metric; arms:
    by arm and load."""

    required_speedup: float
    speedup: dict[str, SpeedUp]
    arms: dict[str, dict[str, LoadReport]]


class Side(Strict):
    """The dense model or the pruned one. perplexity: by text; accuracy: by task; bytes: of the
    weights that were served."""

    layers: int
    parameters: int
    backend: str
    dtype: str | None
    perplexity: dict[str, Estimate]
    accuracy: dict[str, Accuracy]
    average_accuracy: Estimate | None
    answers: AnswersRecord | None
    bytes: int


class EvaluatedText(Strict):
    """A text that perplexity is of. sha256: of the segments' token ids."""

    source: str
    separator: str | None
    segments: int
    tokens: int
    bos: int | None
    predicted_tokens: int
    sha256: str


class AnsweredPrompt(Strict):
    prompt: str
    dense: Answer
    pruned: Answer


class ExportedArtifact(Strict):
    """verification: what was found when it was exported, by runtime. files: name -> SHA-256."""

    gradmap_json_sha256: str
    verification: dict[str, LogitComparison]
    files: dict[str, str]


class Result(Strict):
    """verdict: the worse of the two gates'. texts, tasks, comparison, quality, answers, segment: as
    in eval.json. artifacts: by their directory below the run's. timings_s: seconds that each stage
    took when it last ran.
    """

    schema_version: int
    verdict: Verdict
    model: str
    dense: Side
    pruned: Side
    texts: dict[str, EvaluatedText]
    tasks: dict[str, TaskRecord]
    comparison: QualityComparison
    quality: QualityResult | None
    answers: list[AnsweredPrompt]
    segment: int
    loadtest: LoadTestResult
    artifacts: dict[str, ExportedArtifact]
    timings_s: dict[str, float]
    environment: dict[str, str]

    @property
    def model_name(self) -> str:
        """What the model itself is called, without the folder, the organisation or the `.gguf`."""
        return PurePath(self.model).name.removesuffix(".gguf") or self.model

    @property
    def judgements(self) -> dict[str, Judged]:
        """Gate -> its verdict and reason; quality only if the recipe asks for some."""
        speed: dict[str, Judged] = {"speed": self.loadtest}
        return speed if self.quality is None else speed | {"quality": self.quality}


def build_result(
    out: Path,
    load_report: dict[str, Any],
    timings_s: dict[str, float],
    environment: dict[str, str] | None = None,
) -> Result:
    """Assembles the results of the stages below `out`. environment: of the run; by default this
    machine's.

    Raises UserError if one is missing, damaged or of another version.
    """
    places = Places(out)
    evaluation = read_evaluation(places.evaluation, of_two=True).contents()
    judged = filter(None, (load_report, evaluation["quality"]))
    taken = ("model", "texts", "tasks", "comparison", "quality", "answers")
    contents = {key: evaluation[key] for key in taken} | {
        "schema_version": SCHEMA_VERSION,
        "verdict": worst(Verdict(gate["verdict"]) for gate in judged),
        "dense": _side(evaluation["dense"], places.dense),
        "pruned": _side(evaluation["pruned"], places.pruned),
        "segment": evaluation["settings"]["segment"],
        "loadtest": {key: load_report[key] for key in LoadTestResult.model_fields},
        "artifacts": _artifacts(out),
        "timings_s": timings_s,
        "environment": environment or describe_environment(),
    }
    # the other stages' results are read as strictly as this one
    return checked(Result, contents, places.evaluation)


def read_result(directory: Path) -> Result:
    """The result.json of a run. Raises UserError if it is missing, damaged or of another
    version."""
    path = directory / RESULT_FILE
    contents = read_json_object(path)
    if contents.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path} is of another version of gradmap; run the recipe again.")
    return checked(Result, contents, path)


def _side(measured: dict[str, Any], served: Path) -> dict[str, Any]:
    return measured | {"bytes": read_record(served).weight_bytes}


def _artifacts(out: Path) -> dict[str, dict[str, Any]]:
    artifacts = {}
    for path in sorted(marker.parent for marker in out.glob(f"**/{ARTIFACT_FILE}")):
        recorded = read_record(path).model_dump(mode="json", include={"files", "verification"})
        hashed = {"gradmap_json_sha256": sha256_file(path / ARTIFACT_FILE)}
        artifacts[str(path.relative_to(out))] = hashed | recorded
    return artifacts
