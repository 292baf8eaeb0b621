"""The model card: what the hub reads, and whose results get into it."""

import json

import pytest
from huggingface_hub import ModelCard

from export.artifact import read_quality
from export.card import render_card
from gradmap.common.errors import UserError
from gradmap.evaluation.result import SCHEMA_VERSION
from tests.export.conftest import QUALITY
from tests.export.sources import SHIFTED, make_source


def test_the_model_card_is_what_the_hub_reads(artifact):
    card = ModelCard.load(artifact[0] / "README.md")
    assert card.data.library_name == "transformers"
    assert "layer-pruning" in card.data.tags
    results = [
        (one.dataset_name, one.metric_type, one.metric_value) for one in card.data.eval_results
    ]
    assert results == [("squad", "perplexity", 12.5), ("piqa", "acc_norm", 62.5)]
    assert "12.5 ± 0.5" in card.text
    assert "| piqa, acc_norm, 5-shot chat | 62.5 ± 1.1 % |" in card.text


def test_the_card_says_what_is_gone(picos, artifact):
    plan = make_source(picos["llama"], removed=SHIFTED).plan
    removed = "M1+A2 (the FFN of layer 1 and the attention of layer 2), 3"
    described = render_card(plan, artifact[2], {}).splitlines()
    assert any("3 of 5 layers are left" in line for line in described)
    assert f"- removed layers (original indices, in order of removal): {removed}" in described


def test_a_name_is_no_markup_in_the_card(artifact):
    name = "a](http://evil) <script> | b"
    card = render_card(
        None, artifact[2].model_copy(update={"name": name}), QUALITY | {"perplexity": {}}
    )
    assert r"# a\](http&#58;//evil) \<script\> \| b" in card.splitlines()


def test_a_directory_of_this_machine_is_no_base_model_of_the_hub(artifact, tmp_path, monkeypatch):
    base = artifact[2].base_model
    of_hub = artifact[2].model_copy(
        update={"base_model": base.model_copy(update={"name": "models/llama"})}
    )
    monkeypatch.chdir(tmp_path)
    assert "base_model: models/llama" in render_card(None, of_hub, {})
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert "base_model" not in render_card(None, of_hub, {})


def evaluation_of(model, plan_sha256):
    """As `gradmap eval` writes it."""
    accuracy = QUALITY["accuracy"]["piqa"]
    estimate = {key: accuracy[key] for key in ("value", "stderr")}
    side = {
        "layers": 5,
        "parameters": 1,
        "backend": "transformers",
        "dtype": "float32",
        "perplexity": QUALITY["perplexity"],
        "accuracy": {"piqa": accuracy | {"metrics": {"acc_norm": estimate}}},
        "average_accuracy": estimate,
        "answers": None,
    }
    interval = {"value": 1.0, "low": 0.9, "high": 1.1}
    task = {"difference": interval, "only_dense": 1, "only_pruned": 2, "p_value": 0.5}
    text = {"source": "squad", "separator": "\n", "segments": 9, "tokens": 128, "bos": None}
    drawn = {
        "source": "hub",
        "versions": ["1"],
        "documents": 1,
        "left_out": 0,
        "few_shot": 0,
        "chat": False,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "plan_sha256": plan_sha256,
        "texts": {"squad": text | {"predicted_tokens": 127, "sha256": "-"}},
        "tasks": {"piqa": drawn},
        "dense": side,
        "pruned": side,
        "comparison": {
            "tasks": {"piqa": task},
            "average": {"difference": interval, "retained": interval},
            "perplexity_ratio": {"squad": interval},
            "answers": None,
        },
        "quality": None,
        "answers": [],
        "settings": {"limit": None, "seed": 0, "segment": 128},
        "environment": {},
    }


def test_results_of_another_model_do_not_get_into_the_card(artifact, tmp_path):
    results = tmp_path / "eval.json"
    results.write_text(json.dumps(evaluation_of(artifact[1].checkpoint.name, "other")))
    with pytest.raises(UserError, match="evaluates another model or plan"):
        read_quality(results, artifact[1])


def test_results_of_another_protocol_do_not_get_into_the_card(artifact, tmp_path):
    results, source = tmp_path / "eval.json", artifact[1]
    contents = evaluation_of(source.checkpoint.name, source.plan_hash)
    results.write_text(json.dumps(contents))
    assert read_quality(results, source)["perplexity"] == QUALITY["perplexity"]
    assert read_quality(results, source)["asked"] == {"piqa": "zero-shot"}
    results.write_text(json.dumps(contents | {"schema_version": 2}))
    with pytest.raises(
        UserError, match=r"has evaluation schema 2.* cannot be compared; evaluate again"
    ):
        read_quality(results, source)
