"""Exported directories are stock checkpoints that compute what the plan says."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from export import writers
from export.artifact import ExportSettings, export_artifacts
from export.fold import fold_weight, plan_fold, split_shards
from export.reference import random_probe
from export.safetensors_stream import TensorSpec, write_safetensors
from export.writers import Source
from gradmap.compensation import pruned_and_corrected
from gradmap.errors import UserError
from gradmap.files import sha256_file
from gradmap.plan import BaseModelIdentity, CalibrationRecord, Plan, StepRecord
from tests.conftest import LAYERS

REMOVED = (3, 1)
CORRECTED = 4
SHARD_BYTES = 30_000
# Stands in for an environment without our packages: importing any of them fails.
WITHOUT_US = "import sys; sys.modules.update(dict.fromkeys(('gradmap', 'export', 'serving', 'loadtest')));"


def make_source(pico) -> Source:
    """A hand-made plan with a strong correction, so that a lost or misplaced W' cannot hide."""
    width = len(pico.load().get_input_embeddings().weight[0])
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    checkpoint = pico.checkpoint
    plan = Plan(
        base_model=BaseModelIdentity(
            name=checkpoint.name, model_type=pico.family, layers=LAYERS, files=checkpoint.file_hashes
        ),
        recipe={},
        calibration=CalibrationRecord(source="-", seed=0, samples=1, tokens=1, held_out_samples=1, sha256="-"),
        removal_order=list(REMOVED),
        steps=[StepRecord(scores={}, removed=list(REMOVED))],
        drift={},
        corrections=[],
        environment={},
        timings_s={},
    )
    matrices = {CORRECTED: torch.eye(width, dtype=torch.float64) + 0.5 * noise}
    return Source(checkpoint, plan, "-", matrices, random_probe(200)[:, :20])


def export(source, out, *formats, shard_bytes=10**9, **settings):
    """Without vLLM's own check, which takes a minute; tests/test_end_to_end.py has it."""
    return export_artifacts(source, ExportSettings(formats, shard_bytes=shard_bytes, check_vllm=False, **settings), out)


def unfolded_logits(pico, source, dtype):
    model = pico.load(dtype)
    with pruned_and_corrected(model, pico.architecture, source.removed, source.matrices):
        return model(input_ids=source.probe_ids).logits


def test_artifacts_reproduce_the_unfolded_model(pico, tmp_path):
    source = make_source(pico)
    records = export(source, tmp_path, "hf", "vllm", shard_bytes=SHARD_BYTES)
    expected = unfolded_logits(pico, source, torch.float64)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    # W' W_down was rounded once to float32 (2^-24); everything else is float64
    difference = (hf(input_ids=source.probe_ids).logits - expected).norm() / expected.norm()
    assert difference < LAYERS * 2**-24
    assert hf.config.num_hidden_layers == LAYERS - 2
    vllm = load_file(next((tmp_path / "vllm").glob("*.safetensors")))
    assert {tensor.dtype for tensor in vllm.values() if tensor.is_floating_point()} == {torch.bfloat16}
    check = records["vllm"]["verification"]["transformers"]
    assert check["relative_difference"] < check["tolerance"]


def test_every_file_is_hashed_and_shards_are_indexed(picos, tmp_path):
    export(make_source(picos["qwen2"]), tmp_path, "hf", shard_bytes=SHARD_BYTES)
    record = json.loads((tmp_path / "hf" / "gradmap.json").read_text())
    files = {path.name for path in (tmp_path / "hf").iterdir()} - {"gradmap.json"}
    assert record["files"] == {name: sha256_file(tmp_path / "hf" / name) for name in files}
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert record["weight_bytes"] == index["metadata"]["total_size"]
    assert {"README.md", "tokenizer.json", "config.json"} <= files


def test_it_generates_in_plain_transformers_without_our_packages(picos, tmp_path):
    source = make_source(picos["opt"])
    export(source, tmp_path, "hf")
    script = WITHOUT_US + (
        "from transformers import AutoModelForCausalLM; import torch;"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'hf')!r});"
        "ids = torch.tensor([[5, 6, 7, 8]]);"
        "texts = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=c).tolist() for c in (True, False)];"
        "assert texts[0] == texts[1] and len(texts[0][0]) > 4; print('generated')"
    )
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=os.environ)
    assert finished.stdout.strip() == "generated", finished.stderr


@pytest.mark.parametrize("mistake", ["lost correction", "wrong layer"])
def test_a_wrong_artifact_is_refused_and_leaves_nothing(picos, tmp_path, monkeypatch, mistake):
    right = make_source(picos["llama"])

    def wrong_fold(checkpoint, architecture, removed, matrices, dtype):
        if mistake == "lost correction":
            return plan_fold(checkpoint, architecture, removed, {}, dtype)
        return plan_fold(checkpoint, architecture, (3, 2), matrices, dtype)

    monkeypatch.setattr(writers, "plan_fold", wrong_fold)
    for name in ("hf", "vllm"):
        with pytest.raises(UserError, match="differ from the reference"):
            export(right, tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_folding_a_transposed_weight_is_folding_the_weight():
    generator = torch.Generator().manual_seed(0)
    weight, matrix = torch.randn(6, 9, generator=generator), torch.randn(6, 6, generator=generator).double()
    torch.testing.assert_close(fold_weight(weight.mT, matrix, True), fold_weight(weight, matrix, False).mT)


def test_the_stream_is_what_the_safetensors_library_reads(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(7).bfloat16(), "d": torch.zeros(0, 2)}
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    digest = write_safetensors(tmp_path / "x.safetensors", specs, tensors.values())
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert digest == sha256_file(tmp_path / "x.safetensors")


def test_shards_keep_order_and_stay_below_the_limit(picos):
    source = make_source(picos["llama"])
    folded = plan_fold(source.checkpoint, picos["llama"].architecture, REMOVED, source.matrices, None)
    shards = split_shards(folded, SHARD_BYTES)
    assert [tensor for shard in shards for tensor in shard] == folded
    assert all(sum(tensor.spec.bytes for tensor in shard) <= SHARD_BYTES or len(shard) == 1 for shard in shards)


def test_an_unknown_format_or_a_foreign_directory_is_refused(picos, tmp_path):
    source = make_source(picos["llama"])
    with pytest.raises(UserError, match="Unknown format"):
        export(source, tmp_path, "gguf")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="will not be overwritten"):
        export(source, tmp_path, "hf")
    assert (tmp_path / "hf" / "mine.txt").read_text() == "keep"
