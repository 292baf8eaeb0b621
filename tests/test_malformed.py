"""Whatever is in a file that is read, it is read, or refused in one sentence: no reader of ours
ends in a traceback.

Two kinds of files: broken bytes and shapes, and valid files of which a part is gone or another
value.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.integrity import SCHEMA_VERSION, ArtifactRecord, BaseRecord, PlanRecord, read_record
from gradmap.common.errors import UserError
from gradmap.common.files import write_json
from gradmap.data.texts import read_texts
from gradmap.evaluation.contamination import CalibratedOn
from gradmap.evaluation.result import read_evaluation
from gradmap.evaluation.table import describe_retained, tabulate
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.ends import end_tokens
from gradmap.model.loading import load_tokenizer
from gradmap.model.model_sizes import read_sizes
from gradmap.model.safetensors_reader import list_tensors
from gradmap.pruning.from_plan import prune_from_plan
from gradmap.pruning.plan import Plan, load_calibration_ids, load_changes, load_plan
from gradmap.pruning.presets import choose_methods
from gradmap.pruning.settings import PruneSettings
from loadtest.loads import OpenLoop
from loadtest.pipeline.recipe import load_recipe
from loadtest.prompts import RandomPrompts, Workload
from loadtest.workload import draw_requests, load_requests, save_requests
from tests.command_line import gradmap
from tests.conftest import ROOT, Pico
from tests.gradmap.pruning.test_prune import prune_arguments

BROKEN = {
    "empty": b"",
    "blank": b" \n",
    "zeros": b"\0" * 16,
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "gzip": b"\x1f\x8b\x08\0",
    "zip": b"PK\3\4",
    "cut": b'{"a": [1, ',
    "list": b"[]",
    "list of lists": b"[[]]",
    "list of objects": b"[{}]",
    "object": b"{}",
    "object of lists": b'{"a": []}',
    "string": b'"a"',
    "number": b"1",
    "large number": b"1" * 5000,
    "null": b"null",
    "NaN": b"NaN",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "surrogate": rb'{"a": "\ud800"}',
    "yaml": b"a: [1, 2]\n",
    "yaml anchor": b"a: &a [*a]\n",
    "yaml date": b"a: !!timestamp x\n",
    "yaml bool": b"a: !!bool x\n",
    "yaml map": b"a: !!map [1]\n",
    "yaml keys": b"{[1]: 2, {}: 3}\n",
}
VALUES: tuple[Any, ...] = (
    None,
    [],
    [[None]],
    {},
    {"a": []},
    "",
    "a",
    True,
    0,
    -1,
    7,
    1.5,
    10**30,
    float("nan"),
)
GONE = object()
# So many changes of each file are tried: enough to reach every kind of key, and to take seconds.
MUTATIONS = 150


@dataclass(frozen=True)
class Reader:
    """A file that is valid, and what reads it. as_text: of its value."""

    path: Path
    read: Callable[[], object]
    as_text: Callable[[Any], str] = json.dumps
    mutations: int = MUTATIONS


def places_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value inside a value; of a list, of its first."""
    yield place
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield from places_in(child, (*place, key))


def mutated(value: Any) -> Iterator[Any]:
    """The value with one part replaced, or gone."""
    yield from VALUES
    for *path, last in filter(None, places_in(value)):
        for replacement in (*VALUES, GONE):
            changed = copy.deepcopy(value)
            parent = changed
            for key in path:
                parent = parent[key]
            parent[last] = replacement
            if replacement is GONE:
                del parent[last]
            yield changed


def require_success_or_sentence(reader: Reader, contents: bytes) -> None:
    reader.path.write_bytes(contents)
    try:
        reader.read()
    except UserError as error:
        message = str(error)
        assert message.strip(), contents
        assert "Traceback" not in message, contents


@pytest.fixture(scope="session")
def made(picos: dict[str, Pico], word_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan, an artifact, evaluations and what else is read, of a pico model."""
    out, model = tmp_path_factory.mktemp("made"), picos["llama"].directory
    (out / "other.txt").write_text(" ".join(f"w{3 + (7 * index) % 190}" for index in range(400)))
    tokens = ("--segment", 16, "--limit", 2, "--answers")
    evaluation = ("--perplexity", f"own=file:{out}/other.txt", *tokens, "--out", out / "eval.json")
    for command in (
        prune_arguments(picos["llama"], word_file, out / "plan"),
        ("eval", "--model", model, "--plan", out / "plan", *evaluation),
    ):
        finished = gradmap(*command)
        assert finished.returncode == 0, finished.stderr
    write_json(out / "gradmap.json", make_record(load_plan(out / "plan")).model_dump())
    save_requests(
        out / "requests.json",
        draw_requests(RandomPrompts(Workload(), 9), "a", 2, OpenLoop("constant", 4.0), 0),
    )
    (out / "text.jsonl").write_text('{"text": {"body": ["a"]}}')
    return out


def make_record(plan: Plan) -> ArtifactRecord:
    """As of an artifact that was made with the plan."""
    return ArtifactRecord(
        schema_version=SCHEMA_VERSION,
        name="a",
        format="hf",
        dtype="float32",
        quantise=None,
        calibration=None,
        layers=len(plan.kept_layers),
        parameters=9,
        weight_bytes=36,
        base_model=BaseRecord(name="b", files={"config.json": "0" * 64}, license=None),
        plan=PlanRecord(
            sha256="0" * 64,
            removal_order=plan.removal_order,
            corrected_layers=[],
            calibration=plan.calibration.model_dump(),
            healing=[],
        ),
        verification={},
        environment={"torch": "2"},
        files={"config.json": "0" * 64},
    )


def show_evaluation(path: Path) -> None:
    result = read_evaluation(path, of_two=True).contents()
    tabulate(result)
    describe_retained(result)


def read_plan(directory: Path, model: Path, out: Path) -> None:
    """All that reads it, up to where its tensors are used."""
    plan = load_plan(directory)
    load_changes(directory, plan)
    load_calibration_ids(directory, plan)
    for group in plan.correction_groups:
        group.describe()
    methods = choose_methods(None, directory)
    # 9: refused before it is made
    wanted = PruneSettings(
        remove=9,
        calibration="file:a.txt",
        selector=methods.selector,
        compensator=methods.compensator,
    )
    prune_from_plan(open_checkpoint(str(model)), directory, wanted, out)


def read_calibration(directory: Path, model: Path) -> None:
    CalibratedOn.of_pruned(str(directory), load_tokenizer(model))


@pytest.fixture(
    params=[
        "config",
        "index",
        "sizes",
        "ends",
        "plan",
        "artifact",
        "contamination",
        "evaluation",
        "recipe",
        "requests",
        "text",
    ]
)
def reader(
    request: pytest.FixtureRequest, made: Path, picos: dict[str, Pico], tmp_path: Path
) -> Iterator[Reader]:
    model = tmp_path / "model"
    model.mkdir()
    for path in picos["llama"].directory.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    index = model / "model.safetensors.index.json"
    if request.param == "index":  # which is not read beside a single weight file
        weights = (model / "model.safetensors").rename(model / "weights.safetensors")
        weight_map = {tensor.spec.name: weights.name for tensor in list_tensors(weights)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "recipes" / "smollm2.yaml").read_text())
    artifact, evaluation = made / "gradmap.json", made / "eval.json"
    plan, requests = made / "plan" / "plan.json", made / "requests.json"
    text = made / "text.jsonl"
    ends = model / "generation_config.json"
    readers = {
        "config": Reader(model / "config.json", lambda: open_checkpoint(str(model)), mutations=60),
        "index": Reader(index, lambda: open_checkpoint(str(model)), mutations=40),
        "sizes": Reader(model / "config.json", lambda: read_sizes(model)),
        "ends": Reader(ends, lambda: end_tokens(model, {})),
        "plan": Reader(plan, lambda: read_plan(plan.parent, model, tmp_path / "less")),
        "artifact": Reader(artifact, lambda: read_record(artifact.parent)),
        "contamination": Reader(artifact, lambda: read_calibration(artifact.parent, model)),
        "evaluation": Reader(evaluation, lambda: show_evaluation(evaluation)),
        "recipe": Reader(recipe, lambda: load_recipe(recipe), as_text=yaml.safe_dump),
        "requests": Reader(requests, lambda: load_requests(requests)),
        "text": Reader(text, lambda: read_texts(f"file:{text}#text.body.0", 0)),
    }
    chosen = readers[request.param]
    valid = chosen.path.read_bytes()
    yield chosen
    if chosen.path.is_dir():
        chosen.path.rmdir()
    chosen.path.write_bytes(valid)


def test_broken_files_are_read_or_refused_in_a_sentence(reader: Reader) -> None:
    for contents in BROKEN.values():
        require_success_or_sentence(reader, contents)
    reader.path.unlink()
    reader.path.mkdir()
    with pytest.raises(UserError, match=reader.path.name):
        reader.read()


def test_changed_files_are_read_or_refused_in_a_sentence(reader: Reader) -> None:
    value = yaml.safe_load(reader.path.read_text())
    changes = list(mutated(value))
    for change in random.Random(0).sample(changes, min(reader.mutations, len(changes))):
        require_success_or_sentence(reader, reader.as_text(change).encode())
