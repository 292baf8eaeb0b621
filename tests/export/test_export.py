"""Exported directories are stock checkpoints that compute what the plan says."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from export import writers
from export.artifact import export_artifacts, read_quality, verify_directory
from export.card import render_card
from export.fold import plan_fold, write_folded
from export.formats import ExportSettings
from export.reference import random_probe
from export.writers import Source
from gradmap.checkpoint import open_checkpoint
from gradmap.corrections import (
    HIDDEN_STATE,
    LowRank,
    Place,
    Projection,
    Scale,
    Update,
    linear_maps,
    pruned_and_corrected,
    weight_of,
)
from gradmap.errors import UserError
from gradmap.evaluation.result import SCHEMA_VERSION
from gradmap.files import sha256_file
from gradmap.plan import BaseModelIdentity, CalibrationRecord, Plan, StepRecord
from tests.conftest import LAYERS, Pico

REMOVED = (3, 1)
CORRECTED = 4
SHARD_BYTES = 30_000
QUALITY = {
    "perplexity": {"squad": {"value": 12.5, "stderr": 0.5}},
    "accuracy": {"piqa": {"value": 0.625, "stderr": 0.011, "metric": "acc_norm"}},
    "segment": 128,
}
# Stands in for an environment without our packages: importing any of them fails.
WITHOUT_US = "import sys; sys.modules.update(dict.fromkeys(('gradmap', 'export', 'serving', 'loadtest')));"


def make_source(pico, correction=1.0) -> Source:
    """A hand-made plan with strong corrections of every kind, so that one that is lost or misplaced cannot hide."""
    checkpoint = pico.checkpoint
    plan = Plan(
        base_model=BaseModelIdentity(
            name=checkpoint.name, model_type=pico.family, layers=LAYERS, files=checkpoint.file_hashes
        ),
        recipe={},
        calibration=CalibrationRecord(
            source="-", seed=0, samples=1, tokens=1, bos=None, held_out_samples=1, sha256="-"
        ),
        removal_order=list(REMOVED),
        steps=[StepRecord(scores={}, removed=list(REMOVED))],
        drift={},
        corrections=[],
        environment={},
        timings_s={},
    )
    return Source(checkpoint, plan, "-", make_changes(pico, correction), random_probe(200)[:, :20])


def make_changes(pico, correction=1.0):
    """W' on a down projection, scales on the attention's output, an update and a low-rank change on the first map."""
    model = pico.load()
    generator = torch.Generator().manual_seed(5)
    place, module = next(linear_maps(pico.architecture, model, [0]))
    d_out, d_in = weight_of(module).shape

    def noise(scale, *shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    # as large as the weights themselves: in a query projection, more would turn attention into a single token's
    changes = {place: (Update(noise(0.1, d_out, d_in)), LowRank(noise(0.25, 2, d_in), noise(0.25, d_out, 2)))}
    if pico.architecture.uncorrectable is None:
        attention = Place(CORRECTED, pico.architecture.attention_output)
        changes[attention] = (Scale(torch.tensor(-1.5, dtype=torch.float64)), Scale(torch.tensor(0.5)))
        width = len(model.get_input_embeddings().weight[0])
        matrix = correction * (torch.eye(width, dtype=torch.float64) + noise(0.5, width, width))
        changes[Place(CORRECTED, pico.architecture.down_projection)] = (Projection(matrix),)
    return changes


def export(source, out, *formats, shard_bytes=10**9, **settings):
    """Without vLLM's own check, which takes a minute; tests/test_end_to_end.py has it."""
    return export_artifacts(source, ExportSettings(formats, shard_bytes=shard_bytes, check_vllm=False, **settings), out)


def unfolded_logits(pico, source, dtype):
    model = pico.load(dtype)
    with pruned_and_corrected(model, pico.architecture, source.removed, source.changes):
        return model(input_ids=source.probe_ids).logits


def test_artifacts_reproduce_the_unfolded_model(pico, tmp_path):
    source = make_source(pico)
    export(source, tmp_path, "hf", shard_bytes=SHARD_BYTES)
    expected = unfolded_logits(pico, source, torch.float64)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64, experts_implementation="eager")
    # W' W_down was rounded once to float32 (2^-24); everything else is float64
    difference = (hf(input_ids=source.probe_ids).logits - expected).norm() / expected.norm()
    assert difference < LAYERS * 2**-24
    assert hf.config.num_hidden_layers == LAYERS - 2


def test_the_vllm_ready_weights_are_stored_as_they_are_served(picos, tmp_path):
    source = make_source(picos["qwen2"])
    check = export(source, tmp_path, "vllm")["vllm"].verification["transformers"]
    vllm = load_file(tmp_path / "vllm" / "model.safetensors")
    assert {tensor.dtype for tensor in vllm.values()} == {torch.bfloat16}
    assert check.relative_difference <= check.tolerance < 1e-5  # the reference is rounded as they are


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


@pytest.fixture(scope="module")
def artifact(picos, tmp_path_factory):
    """An hf artifact of the Llama pico, its source and its gradmap.json."""
    out, source = tmp_path_factory.mktemp("artifact"), make_source(picos["llama"])
    return out / "hf", source, export(source, out, "hf", quality=QUALITY)["hf"]


def test_an_artifact_can_be_checked_where_it_arrives(artifact, tmp_path, fresh_processes):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    result = verify_directory(received)
    assert result.files == len(artifact[2].files)
    expected, actual = artifact[2].verification["transformers"], result.verification["transformers"]
    assert actual.argmax_agreement == expected.argmax_agreement
    assert actual.relative_difference <= actual.tolerance == expected.tolerance
    assert actual.stray_share == expected.stray_share == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / "tokenizer.json").unlink(), r"lacks tokenizer\.json"),
        (lambda directory: flip_byte(directory / "model.safetensors"), r"model\.safetensors is not what was exported"),
        (lambda directory: (directory / "modeling_evil.py").touch(), r"modeling_evil\.py is not part of the artifact"),
        (lambda directory: (directory / "gradmap.json").unlink(), r"gradmap\.json does not exist"),
    ],
)
def test_a_damaged_or_altered_artifact_is_refused(artifact, tmp_path, damage, message):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    damage(received)
    with pytest.raises(UserError, match=message):
        verify_directory(received)


def test_weights_that_compute_something_else_are_refused_even_if_their_hash_is_right(artifact, tmp_path):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    weights = load_file(received / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, received / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((received / "gradmap.json").read_text())
    record["files"]["model.safetensors"] = sha256_file(received / "model.safetensors")
    (received / "gradmap.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="logits differ from the reference"):
        verify_directory(received)


def change_record(directory, change):
    record = json.loads((directory / "gradmap.json").read_text())
    change(record)
    (directory / "gradmap.json").write_text(json.dumps(record))


def hash_anew(directory):
    """As whoever changes an artifact would."""
    names = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
    files = {name: sha256_file(directory / name) for name in names if name != "gradmap.json"}
    change_record(directory, lambda record: record.update(files=files))


def test_a_record_cannot_allow_itself_a_difference(artifact, tmp_path):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    weights = load_file(received / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, received / "model.safetensors", metadata={"format": "pt"})
    hash_anew(received)
    allowed = {"tolerance": 10.0, "stray_share": 1.0}
    change_record(received, lambda record: record["verification"]["transformers"].update(allowed))
    with pytest.raises(UserError, match="logits differ from the reference"):
        verify_directory(received)
    change_record(received, lambda record: record.update(verification={}))
    with pytest.raises(UserError, match="logits differ from the reference"):
        verify_directory(received)


def test_a_program_in_an_artifact_is_refused_even_if_its_hash_is_right(artifact, tmp_path):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    (received / "modeling_evil.py").write_text("print('ran')")
    hash_anew(received)
    with pytest.raises(UserError, match=r"modeling_evil\.py is a program"):
        verify_directory(received)


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/../config.json", "./config.json", ""])
def test_a_record_names_files_inside_the_directory_only(artifact, tmp_path, name):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    change_record(received, lambda record: record["files"].update({name: "0" * 64}))
    with pytest.raises(UserError, match="no plain name of a file inside the directory"):
        verify_directory(received)


def test_an_artifact_is_not_the_expected_one_if_its_record_is_another(artifact, tmp_path):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    expected = sha256_file(received / "gradmap.json")
    change_record(received, lambda record: record.update(name="another"))
    with pytest.raises(UserError, match=r"gradmap\.json is not the one that is expected"):
        verify_directory(received, expected)


def test_links_of_a_model_are_not_followed_out_of_it(picos, tmp_path):
    model = shutil.copytree(picos["llama"].directory, tmp_path / "model")
    (tmp_path / "id_rsa").write_text("secret")
    (model / "LICENSE").symlink_to("../id_rsa")
    source = Source(open_checkpoint(str(model)), None, None, {}, make_source(picos["llama"]).probe_ids)
    with pytest.raises(UserError, match=r"LICENSE is a link out of the directory"):
        export(source, tmp_path / "out", "hf")
    assert not (tmp_path / "out" / "hf").exists()


def test_code_of_a_models_author_is_left_behind(picos, tmp_path, capsys):
    """Some checkpoints carry code from before transformers had their family."""
    model = shutil.copytree(picos["llama"].directory, tmp_path / "model")
    (model / "modeling_llama.py").write_text("print('ran')")
    (model / "notes.json").write_text("{}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    for name in ("config.json", "tokenizer_config.json"):
        contents = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(contents | {"auto_map": {"AutoModelForCausalLM": "modeling_llama.X"}}))
    source = Source(open_checkpoint(str(model)), None, None, {}, make_source(picos["llama"]).probe_ids)
    export(source, tmp_path / "out", "hf")
    out = tmp_path / "out" / "hf"
    assert "gradmap does not know stay behind: notes.json" in capsys.readouterr().err
    assert not list(out.rglob("*.py"))
    assert "auto_map" not in (out / "config.json").read_text() + (out / "tokenizer_config.json").read_text()
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    verify_directory(out)


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_model_card_is_what_the_hub_reads(artifact):
    card = ModelCard.load(artifact[0] / "README.md")
    assert card.data.library_name == "transformers"
    assert "layer-pruning" in card.data.tags
    results = [(one.dataset_name, one.metric_type, one.metric_value) for one in card.data.eval_results]
    assert results == [("squad", "perplexity", 12.5), ("piqa", "acc_norm", 62.5)]
    assert "12.5 ± 0.5" in card.text
    assert "62.5 ± 1.1 %" in card.text


def test_a_name_is_no_markup_in_the_card(artifact):
    name = "a](http://evil) <script> | b"
    card = render_card(None, artifact[2].model_copy(update={"name": name}), QUALITY | {"perplexity": {}})
    assert r"# a\](http&#58;//evil) \<script\> \| b" in card.splitlines()


def test_a_directory_of_this_machine_is_no_base_model_of_the_hub(artifact, tmp_path, monkeypatch):
    base = artifact[2].base_model
    of_hub = artifact[2].model_copy(update={"base_model": base.model_copy(update={"name": "models/llama"})})
    monkeypatch.chdir(tmp_path)
    assert "base_model: models/llama" in render_card(None, of_hub, {})
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert "base_model" not in render_card(None, of_hub, {})


def evaluation_of(model, plan_sha256):
    """As `gradmap eval` writes it, as far as it is read."""
    side = {"layers": 5, "parameters": 1, "average_accuracy": QUALITY["accuracy"]["piqa"], "answers": None, **QUALITY}
    interval = {"value": 1.0, "low": 0.9, "high": 1.1}
    difference = {"difference": interval, "retained": interval}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "plan_sha256": plan_sha256,
        "texts": {"squad": {}},
        "tasks": {"piqa": {"documents": 1}},
        "dense": side,
        "pruned": side,
        "comparison": {"tasks": {"piqa": difference}, "average": difference, "perplexity_ratio": {"squad": interval}},
        "quality": None,
        "answers": [],
        "settings": {"segment": 128},
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
    results.write_text(json.dumps(contents | {"schema_version": 2}))
    with pytest.raises(UserError, match=r"has evaluation schema 2.* cannot be compared; evaluate again"):
        read_quality(results, source)


def run_export_command(out, *arguments, preamble=""):
    script = f"import sys; {preamble}\nfrom gradmap.cli import main\nsys.argv[1:1] = ['export']\nmain()"
    command = [sys.executable, "-c", script, "--format", "hf", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_kill_in_the_middle_leaves_the_earlier_artifact_whole(picos, artifact, tmp_path):
    shutil.copytree(artifact[0], tmp_path / "hf")
    killer = (
        "import os, export.formats as a;"
        "a.run_artifact_in_each = lambda *_: os.kill(os.getpid(), 9)"  # everything is written, nothing is verified yet
    )
    killed = run_export_command(tmp_path, "--model", str(picos["qwen2"].directory), preamble=killer)
    assert killed.returncode == -9, killed.stderr
    assert verify_directory(tmp_path / "hf").name == "llama-minus-2"


def test_a_full_disk_gives_one_sentence_and_no_debris(picos, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    failed = run_export_command(tmp_path, "--model", str(picos["llama"].directory), preamble=limit)
    assert failed.returncode == 2
    assert "cannot be written: File too large" in failed.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_noticed_before_anything_is_written(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="free some space"):
        export(artifact[1], tmp_path, "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("weight", "correction"), [(1e5, 1.0), (1.0, 1e7)])
def test_a_weight_that_half_precision_cannot_hold_is_named(picos, tmp_path, weight, correction):
    directory = shutil.copytree(picos["llama"].directory, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.4.mlp.down_proj.weight" if correction > 1 else "model.norm.weight"][0] = weight
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    source = make_source(Pico("llama", directory), correction)
    with pytest.raises(UserError, match=r"(norm|down_proj)\.weight.* does not fit in torch\.float16"):
        export(source, tmp_path / "out", "hf", dtype="float16")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("damage", [torch.nan, -torch.inf])
def test_a_weight_that_is_no_number_is_named(picos, tmp_path, damage):
    directory = shutil.copytree(picos["llama"].directory, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.4.mlp.down_proj.weight"][1, 2] = damage
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    source = make_source(Pico("llama", directory))
    folded = plan_fold(source.checkpoint, picos["llama"].architecture, REMOVED, source.changes, torch.float16)
    with pytest.raises(UserError, match=r"down_proj\.weight.* holds NaN or infinity"):
        write_folded(tmp_path, folded, SHARD_BYTES)


@pytest.mark.parametrize("mistake", ["lost correction", "wrong layer"])
def test_a_wrong_artifact_is_refused_and_leaves_nothing(picos, tmp_path, monkeypatch, mistake):
    right = make_source(picos["llama"])

    def wrong_fold(checkpoint, architecture, removed, changes, *rest):
        if mistake == "lost correction":
            return plan_fold(checkpoint, architecture, removed, {}, *rest)
        return plan_fold(checkpoint, architecture, (3, 2), changes, *rest)

    monkeypatch.setattr(writers, "plan_fold", wrong_fold)
    for name in ("hf", "vllm"):
        with pytest.raises(UserError, match="differ from the reference"):
            export(right, tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_patch_of_the_hidden_state_is_refused(picos, tmp_path):
    patch = {Place(0, HIDDEN_STATE): (Projection(2 * torch.eye(32)),)}
    with pytest.raises(UserError, match="no stock checkpoint can hold"):
        export(replace(make_source(picos["llama"]), changes=patch), tmp_path, "hf")


def test_an_unknown_format_or_a_foreign_directory_is_refused(picos, tmp_path):
    source = make_source(picos["llama"])
    with pytest.raises(UserError, match="Unknown format"):
        export(source, tmp_path, "exl2")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="will not be overwritten"):
        export(source, tmp_path, "hf")
    assert (tmp_path / "hf" / "mine.txt").read_text() == "keep"
