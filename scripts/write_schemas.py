"""Writes the JSON schemas of our file formats, as the code defines them, into a directory:
docs/schemas."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from export.integrity import ArtifactRecord
from gradmap.evaluation.result import Evaluation
from gradmap.pruning.plan import Plan
from loadtest.pipeline.recipe import Recipe
from loadtest.pipeline.result import Result
from loadtest.records import BlockRecord, RequestRecord, ResourceSample
from loadtest.schema import Report

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FORMATS: dict[str, Any] = {
    "plan.json": Plan,
    "gradmap.json": ArtifactRecord,
    "eval.json": Evaluation,
    "recipe.yaml": Recipe,
    "result.json": Result,
    "loadtest-report.json": Report,
    "loadtest-records.jsonl": RequestRecord,
    "loadtest-blocks.jsonl": BlockRecord,
    "loadtest-resources.jsonl": ResourceSample,
}


def make_schemas() -> dict[str, str]:
    """File name -> the schema's text. Of a .jsonl file, it is the schema of a line."""
    return {
        f"{name.partition('.')[0]}.schema.json": _schema_text(name, kind)
        for name, kind in FORMATS.items()
    }


def _schema_text(name: str, kind: Any) -> str:
    schema = TypeAdapter(kind).json_schema()
    # the file's name stands in place of the class's
    schema.pop("title", None)
    named = {"$schema": DIALECT, "title": name} | schema
    return json.dumps(named, indent=2) + "\n"


if __name__ == "__main__":
    for name, text in make_schemas().items():
        Path(sys.argv[1], name).write_text(text)
