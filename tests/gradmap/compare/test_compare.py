"""`gradmap compare`: every method under one calibration and one evaluation, and nothing twice."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from gradmap.common import stages
from gradmap.common.errors import UserError
from gradmap.compare.methods import OF_SELECTORS, parse_methods, split_variant
from gradmap.pruning.plan import load_changes, load_plan
from tests.command_line import gradmap
from tests.conftest import perplexity_of_plan

METHODS = (
    "gradient+projection-as-published",
    "gradient+none",
    "random-one-shot+sequential",
    "uidl+ghosted",
)


@pytest.fixture
def commands(monkeypatch):
    """Runs stages in this process; returns the list of what was run."""
    ran = []

    def run(command):
        ran.append(command[4:])
        return gradmap(*command[4:]).returncode, SimpleNamespace(ru_maxrss=10**9 / 1024)

    monkeypatch.setattr(stages, "run_process", run)
    return ran


@pytest.fixture
def compared(picos, word_file, tmp_path, commands):
    (tmp_path / "other.txt").write_text(
        " ".join(f"w{3 + (7 * index) % 190}" for index in range(4000))
    )
    arguments = (
        *(
            "compare",
            "--model",
            picos["llama"].directory,
            "--methods",
            ",".join(METHODS),
            "--remove",
            "2,1",
        ),
        *("--perplexity", f"own=file:{tmp_path}/other.txt", "--limit", 9, "--seeds", "1,2"),
        *("--calibration", f"file:{word_file}", "--samples", 6, "--tokens", 16, "--segment", 32),
        *("--dtype", "float64", "--eval-dtype", "float64", "--out", tmp_path / "compare"),
    )
    finished = gradmap(*arguments)
    assert finished.returncode == 0, finished.stderr
    return tmp_path / "compare", finished, arguments


def test_every_method_at_every_count_with_every_seed(compared, picos, commands):
    out, finished, arguments = compared
    result = json.loads((out / "compare.json").read_text())
    assert [(row["method"], row["removed"]) for row in result["rows"]] == [
        (m, k) for m in METHODS for k in (1, 2)
    ]
    for row in result["rows"]:
        assert [len(layers) for layers in row["layers"]] == [row["removed"]] * 2
        values = []
        for seed in (1, 2):
            record = json.loads(
                (
                    out / "evaluations" / f"{row['method']}-{row['removed']}-seed-{seed}.json"
                ).read_text()
            )
            values.append(record["pruned"]["perplexity"]["own"]["value"])
        assert row["perplexity"]["own"]["value"] == pytest.approx(sum(values) / 2)
        assert row["perplexity"]["own"]["spread"] == pytest.approx(
            abs(values[0] - values[1]) / math.sqrt(2)
        )
        assert row["ratio"]["own"]["value"] == pytest.approx(
            sum(values) / 2 / result["dense"]["perplexity"]["own"]["value"]
        )
    table = (out / "compare.md").read_text()
    assert table.count("\n") == 2 + len(result["rows"])
    assert "| random-one-shot+sequential | 2 |" in table
    assert "Comparison" in finished.stdout
    assert "layers removed" in (out / "perplexity.svg").read_text()
    # two selections, one more at each of two counts, and four methods at two counts, with two
    # seeds; the rest is shared
    assert [command[0] for command in commands].count("prune") == 2 * 2 + 2 * 2 + 4 * 2 * 2
    ran = len(commands)
    assert gradmap(*arguments).returncode == 0
    assert len(commands) == ran  # nothing is done twice


def test_an_evaluation_that_was_changed_is_made_again(compared, commands):
    """As of another protocol, which could not be put beside the others."""
    out, _, arguments = compared
    one = out / "evaluations" / f"{METHODS[1]}-1-seed-2.json"
    before, ran = json.loads(one.read_text()), len(commands)
    one.write_text(json.dumps(before | {"schema_version": 2}))
    finished = gradmap(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert f"eval {one.stem}: {one} was changed" in finished.stderr
    assert [command[0] for command in commands[ran:]] == ["eval"]
    assert json.loads(one.read_text())["pruned"] == before["pruned"]


def test_what_is_reported_is_what_the_plans_do(compared, picos):
    out, _, _ = compared
    name = "gradient+projection-as-published-2-seed-1"
    ids = torch.tensor([3 + (7 * index) % 190 for index in range(9 * 32)]).reshape(9, 32)
    plan = out / "plans" / name
    assert len(load_changes(plan, load_plan(plan))) == 1  # applied, whatever it does
    measured = json.loads((out / "evaluations" / f"{name}.json").read_text())["pruned"][
        "perplexity"
    ]["own"]["value"]
    assert measured == pytest.approx(perplexity_of_plan(picos["llama"], plan, ids), rel=1e-6)


def test_methods_are_named_by_selector_and_compensator():
    assert [method.name for method in parse_methods(["sleb+refit", "sleb+refit"])] == ["sleb+refit"]
    assert split_variant("taylor-protected", OF_SELECTORS) == (
        "taylor",
        {"protect_first": 4, "protect_last": 2},
    )
    assert split_variant("mka-as-released", OF_SELECTORS) == ("mka-as-released", {})
    for text in (
        "sleb",
        "magic+none",
        "sleb+magic",
        "manual+none",
        "sleb-magic+none",
        "sleb+none-one-shot",
        "",
    ):
        with pytest.raises(UserError, match="is no SELECTOR\\+COMPENSATOR"):
            parse_methods([text])
