"""What a config says of positions far into a text is kept by a format, or the format is refused by
name."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from export import far_positions, writers
from export.formats import FORMATS
from export.twin import FAR, NEAR, find_boundaries, probe_beyond, twin_config
from export.writers import Storage
from gradmap.common.errors import UserError
from tests.conftest import make_pico
from tests.export.sources import export, make_source
from tests.gradmap.removals import pairs

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "factor": 4.0,
    "long_factor": [1.5] * 4,
    "short_factor": [1.1] * 4,
    "original_max_position_embeddings": 16,
}
SIZES = {
    "vocab_size": 320,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA = SIZES | {"model_type": "llama", "max_position_embeddings": 131_072, "rope_scaling": LLAMA3}
MISTRAL = SIZES | {
    "model_type": "mistral",
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
}
SHORT, LONG = {"short_factor": [1.0] * 32}, {"long_factor": [8.0] * 32}
PHI3 = SIZES | {
    "model_type": "phi3",
    "max_position_embeddings": 131_072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", **SHORT, **LONG},
    "sliding_window": 256,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
GEMMA3 = SIZES | {
    "model_type": "gemma3_text",
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
    "head_dim": 64,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, {"rope of type llama3": 8192}),
        (MISTRAL, {"sliding_window": 4096}),
        (MISTRAL | {"sliding_window": None}, {}),
        (MISTRAL | {"sliding_window": 32_768}, {}),  # no text is longer
        (GEMMA3, {"sliding_window": 512}),
        (GEMMA3 | {"layer_types": ["full_attention"] * 16}, {}),  # those that slide were removed
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": PLAIN, "full_attention": LLAMA3}},
            {"sliding_window": 512, "rope of type llama3": 8192},
        ),
        (PHI3, {"sliding_window": 256, "rope of type longrope": 4096}),
        (LLAMA | {"rope_scaling": YARN}, {"rope of type yarn": 32_768}),
        (SIZES | {"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, {}),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}),  # any text shows it
    ],
)
def test_boundaries_are_where_the_config_says(config, expected):
    assert find_boundaries(config) == expected


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, GEMMA3, PHI3])
def test_a_twin_is_small_and_its_probe_passes_every_boundary(config):
    twin = twin_config(config)
    assert find_boundaries(twin).keys() == find_boundaries(config).keys()
    assert all(tokens <= FAR for tokens in find_boundaries(twin).values())
    assert probe_beyond(twin).shape[1] > max(find_boundaries(twin).values())
    assert twin["hidden_size"] // twin["num_attention_heads"] == twin["head_dim"] == 64
    assert twin["num_hidden_layers"] <= 4
    assert set(twin.get("layer_types") or []) == set(
        config.get("layer_types") or twin.get("layer_types") or []
    )


@pytest.mark.parametrize("config", [LLAMA, PHI3])
def test_a_twin_has_room_for_as_many_times_its_original_length(config):
    """Ropes are scaled by that ratio, where the config does not say by how much."""
    original = max(
        tokens for what, tokens in find_boundaries(config).items() if what.startswith("rope")
    )
    expected = config["max_position_embeddings"] // original * NEAR
    assert twin_config(config)["max_position_embeddings"] == expected


def test_a_near_window_stays_what_it_is():
    assert twin_config(GEMMA3)["sliding_window"] == 512
    assert twin_config(MISTRAL)["sliding_window"] == NEAR


@pytest.fixture
def far_window(tmp_path):
    """Its window closes behind the probe of an artifact."""
    return make_pico("mistral", tmp_path / "pico", sliding_window=96, max_position_embeddings=256)


def test_a_format_that_keeps_the_window_is_written(far_window, tmp_path, fresh_processes, capsys):
    export(make_source(far_window), tmp_path, "hf")
    assert "keeps the sliding_window (96 tokens)" in capsys.readouterr().err


def test_a_format_that_loses_the_window_is_refused_before_anything_is_written(
    far_window, tmp_path, monkeypatch
):
    kept = writers.artifact_config
    monkeypatch.setattr(
        writers, "artifact_config", lambda *arguments: kept(*arguments) | {"sliding_window": None}
    )
    with pytest.raises(
        UserError, match=r"because of its sliding_window \(96 tokens\): .* logits differ"
    ):
        export(make_source(far_window), tmp_path / "out", "hf")
    assert not list((tmp_path / "out").glob("*"))


def test_a_format_that_forgets_the_ropes_scaling_is_refused(tmp_path, monkeypatch):
    pico = make_pico(
        "llama", tmp_path / "pico", max_position_embeddings=65_536, rope_parameters=LLAMA3
    )
    kept = writers.artifact_config
    plain = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "rope_scaling": None,
    }
    monkeypatch.setattr(writers, "artifact_config", lambda *arguments: kept(*arguments) | plain)
    with pytest.raises(
        UserError, match=r"because of its rope of type llama3 \(8192 tokens\): .* logits differ"
    ):
        export(make_source(pico), tmp_path / "out", "hf")


@pytest.mark.parametrize(
    ("family", "form", "rope"),
    [
        ("llama", "onnx", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 300.0}),
        ("llama", "onnx-genai", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 300.0}),
        ("llama", "gguf", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 300.0}),
        ("phi3", "onnx", LONGROPE),
    ],
)
def test_a_rope_that_follows_the_length_of_the_text_is_refused_where_no_format_says_it(
    tmp_path, family, form, rope
):
    pico = make_pico(
        family, tmp_path / "pico", rope_parameters=rope, original_max_position_embeddings=16
    )
    with pytest.raises(
        UserError, match=f"Format {form} cannot express a rope of type {rope['rope_type']}"
    ):
        export(make_source(pico), tmp_path / "out", form)


def test_a_cache_smaller_than_the_window_is_not_what_refuses_a_model(tmp_path):
    """What onnxruntime-genai makes of Gemma 2 is judged by its logits."""
    pico = make_pico(
        "gemma2", tmp_path / "pico", sliding_window=200, max_position_embeddings=512, head_dim=16
    )
    with pytest.raises(UserError, match="logits differ from the reference"):
        export(make_source(pico), tmp_path / "out", "onnx-genai")


@pytest.fixture
def checked(monkeypatch, capsys):
    """What is checked of a source, in words; nothing is written or run for it."""

    def check(source):
        monkeypatch.setattr(far_positions, "_problem_of_twin", lambda *_: None)
        far_positions.require_far_positions(
            source, FORMATS["hf"], Storage("float32", None, 10**9), []
        )
        return capsys.readouterr().err

    return check


@pytest.mark.parametrize(("window", "seen"), [(19, True), (20, False)])
def test_a_window_as_long_as_the_probe_is_not_seen_by_it(tmp_path, checked, window, seen):
    """The first token that it hides is hidden from the one behind it."""
    source = make_source(make_pico("mistral", tmp_path / "pico", sliding_window=window))
    assert source.probe_ids.shape[1] == 20
    assert ("sliding_window" not in checked(source)) == seen


def test_a_window_that_was_removed_with_its_layers_is_not_checked(tmp_path, checked):
    kinds = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    source = make_source(
        make_pico("gemma3_text", tmp_path / "pico", layer_types=kinds, sliding_window=32)
    )
    assert checked(source) == ""
    assert "sliding_window (32 tokens)" in checked(replace(source, plan=None))


def test_each_runtime_has_to_keep_what_is_far(far_window, tmp_path, monkeypatch):
    problems = {"first": None, "second": "its logits differ"}
    comparisons = {runtime: SimpleNamespace(runtime=runtime) for runtime in problems}
    monkeypatch.setattr(far_positions, "compare_in_each", lambda *arguments: comparisons)
    monkeypatch.setattr(
        far_positions, "find_problem", lambda comparison: problems[comparison.runtime]
    )
    with pytest.raises(
        UserError, match=r"sliding_window \(96 tokens\): in second, its logits differ"
    ):
        export(make_source(far_window), tmp_path / "out", "hf")


def test_the_twins_weights_are_seeded(far_window, tmp_path):
    from export.twin import write_twin

    twins = [
        write_twin(far_window.checkpoint, pairs(1), tmp_path / name, ("tokenizer*",))
        for name in "ab"
    ]
    assert twins[0].file_hashes == twins[1].file_hashes
    assert json.loads((tmp_path / "a" / "config.json").read_text())["num_hidden_layers"] == 2
    assert torch.equal(probe_beyond(twins[0].config), probe_beyond(twins[1].config))
