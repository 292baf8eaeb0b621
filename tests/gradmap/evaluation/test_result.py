"""eval.json is what its model says: nothing else is written, and nothing else is read."""

import json

import jsonschema
import pytest

from gradmap.common.errors import UserError
from gradmap.common.files import write_json
from gradmap.evaluation.result import SCHEMA_VERSION, read_evaluation
from tests.command_line import gradmap
from tests.conftest import ROOT

SCHEMA = ROOT / "docs" / "schemas" / "eval.schema.json"
# The keys of one model's file, in the order in which they have always been written.
KEYS = [
    "schema_version",
    "model",
    "plan_sha256",
    "texts",
    "tasks",
    "dense",
    "comparison",
    "quality",
    "answers",
    "settings",
    "environment",
]


@pytest.fixture(scope="module")
def results(picos, tmp_path_factory):
    """Of one model, and of two: here the same one twice."""
    out = tmp_path_factory.mktemp("results")
    (out / "text.txt").write_text(" ".join(f"w{3 + (7 * index) % 190}" for index in range(400)))
    model = picos["llama"].directory
    asked = ("--perplexity", f"own=file:{out}/text.txt", "--segment", 16, "--answers")
    gate = ("--pruned", model, "--max-perplexity-ratio", 2)
    for name, other in (("one", ()), ("two", gate)):
        finished = gradmap("eval", "--model", model, *asked, *other, "--out", out / f"{name}.json")
        assert finished.returncode == 0, finished.stderr
    return out


@pytest.mark.parametrize("name", ["one", "two"])
def test_what_is_written_is_read_and_follows_the_schema(results, name):
    path = results / f"{name}.json"
    contents = json.loads(path.read_text())
    assert json.dumps(read_evaluation(path).contents()) == json.dumps(contents)
    jsonschema.validate(contents, json.loads(SCHEMA.read_text()))


def test_what_one_model_lacks_is_absent(results):
    one, two = (json.loads((results / f"{name}.json").read_text()) for name in ("one", "two"))
    assert list(one) == KEYS
    assert set(two) - set(one) == {"pruned"}
    assert one["comparison"] is None and one["quality"] is None
    assert list(one["answers"][0]) == ["prompt", "dense"]
    assert list(two["answers"][0]) == ["prompt", "dense", "pruned"]
    assert two["quality"]["max_perplexity_ratio"] == 2
    assert two["comparison"]["perplexity_ratio"]["own"]["value"] == 1


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((), {"typo": 1}, r"typo: this key is not known; evaluate again\."),
        (("texts", "own"), {"typo": 1}, r"texts\.own\.typo: this key is not known"),
        (("dense",), {"typo": 1}, r"dense\.typo: this key is not known"),
        (("dense", "perplexity", "own"), {"typo": 1}, r"dense\.perplexity\.own\.typo: .*"),
        (("comparison",), {"typo": 1}, r"comparison\.typo: .*"),
        (("quality",), {"typo": 1}, r"quality\.typo: this key is not known"),
        (("settings",), {"segment": "16"}, r"settings\.segment: .*valid integer; evaluate again"),
        (("settings",), {"segment": True}, r"settings\.segment: .*valid integer; evaluate again"),
        (("dense", "perplexity", "own"), {"value": "1"}, r"own\.value: .*valid number"),
        (("quality",), {"verdict": "GOOD"}, r"quality\.verdict: .*; evaluate again"),
        ((), {"tasks": []}, r"tasks: .*; evaluate again"),
        (("texts",), {}, None),
    ],
)
def test_another_key_or_kind_of_value_is_refused_by_name(results, tmp_path, place, value, message):
    contents = json.loads((results / "two.json").read_text())
    part = contents
    for key in place:
        part = part[key]
    part.update(value)
    path = tmp_path / "eval.json"
    write_json(path, contents)
    if message is None:
        assert read_evaluation(path).contents() == contents
        return
    with pytest.raises(UserError, match=rf"eval\.json: .*{message}"):
        read_evaluation(path)


def test_a_key_that_is_missing_is_named(results, tmp_path):
    contents = json.loads((results / "two.json").read_text())
    del contents["dense"]["backend"]
    write_json(tmp_path / "eval.json", contents)
    with pytest.raises(UserError, match=r"dense\.backend: Field required; evaluate again"):
        read_evaluation(tmp_path / "eval.json")


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, None])
def test_another_version_is_refused_by_its_number(results, tmp_path, version):
    contents = json.loads((results / "two.json").read_text())
    write_json(tmp_path / "eval.json", contents | {"schema_version": version})
    with pytest.raises(UserError, match=f"evaluation schema {version}, .*; evaluate again"):
        read_evaluation(tmp_path / "eval.json")
