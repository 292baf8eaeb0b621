"""The front door: what `from gradmap import ...` gives does what the commands do."""

import json
import random
import re
import subprocess
import sys
from typing import Any

import pytest

import gradmap
from gradmap.common.errors import UserError
from tests.conftest import ROOT, make_pico


def test_a_model_is_pruned_evaluated_and_exported_from_python(picos, word_file, tmp_path):
    from gradmap import evaluate, export, load_plan, open_checkpoint, prune

    checkpoint = open_checkpoint(str(picos["llama"].directory))
    calibration: dict[str, Any] = {"calibration": f"file:{word_file}", "samples": 8, "tokens": 16}
    plan = prune(checkpoint, tmp_path / "plan", remove=2, preset="gradmap", **calibration)
    assert load_plan(tmp_path / "plan") == plan
    more = prune(checkpoint, tmp_path / "more", from_plan=tmp_path / "plan", remove=3)
    assert more.removal_order[:2] == plan.removal_order and len(more.removal_order) == 3
    (tmp_path / "test.txt").write_text(" ".join(f"w{3 + 7 * index % 190}" for index in range(900)))
    texts = {"own": f"file:{tmp_path}/test.txt"}
    quality = evaluate(
        checkpoint, tmp_path / "eval.json", plan=tmp_path / "plan", perplexity=texts, segment=16
    )
    assert quality.dense.perplexity["own"].value > 1
    assert (tmp_path / "eval.json").is_file()
    records = export(checkpoint, tmp_path / "out", plan=tmp_path / "plan", formats=["hf"])
    assert records["hf"].layers == quality.pruned.layers == plan.base_model.layers - 2
    assert (tmp_path / "out" / "hf" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def directory_with_a_model(tmp_path_factory):
    """And with the texts that the documentation's examples name."""
    directory = tmp_path_factory.mktemp("examples")
    make_pico("llama", directory / "path" / "to" / "model", max_position_embeddings=256)
    generator = random.Random(3)
    for name in ("texts", "other"):
        texts = [[f"w{generator.randrange(3, 190)}" for _ in range(200)] for _ in range(200)]
        lines = [json.dumps({"text": " ".join(words)}) for words in texts]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    return directory


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_examples_of_the_documentation_run(directory_with_a_model, page, monkeypatch):
    monkeypatch.chdir(directory_with_a_model)
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.M)
    assert examples
    for example in examples:
        exec(compile(example, page, "exec"), {})


def test_options_are_those_of_the_commands(picos, tmp_path):
    checkpoint = gradmap.open_checkpoint(str(picos["llama"].directory))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"remove": 2, "tokns": 8}, "tokns: extra inputs are not permitted"),
        ({"remove": 2, "seed": -1}, "--seed is -1; give a number from 0"),
        ({}, "Give either --remove K or --ratio R"),
    ]
    for options, message in refused:
        with pytest.raises(UserError, match=message):
            gradmap.prune(checkpoint, tmp_path / "plan", **options)


def test_the_front_door_is_light():
    code = "import gradmap, sys; print('torch' in sys.modules, sorted(gradmap.__all__))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout.split(" ", 1)[0] == "False", finished.stderr
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        gradmap.prunes  # noqa: B018
