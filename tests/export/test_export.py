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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from export import writers
from export.artifact import open_source, verify_directory
from export.fold import plan_fold, write_folded
from export.writers import Source
from gradmap.common.errors import UserError
from gradmap.common.files import sha256_file
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.corrections import (
    HIDDEN_STATE,
    Place,
    Projection,
)
from tests.conftest import Pico, make_pico
from tests.export.sources import (
    REMOVED,
    SHARD_BYTES,
    WITHOUT_US,
    export,
    make_source,
    unfolded_logits,
)
from tests.families import LAYERS
from tests.gradmap.removals import pairs


def test_artifacts_reproduce_the_unfolded_model(pico, tmp_path):
    source = make_source(pico)
    export(source, tmp_path, "hf", shard_bytes=SHARD_BYTES)
    expected = unfolded_logits(pico, source, torch.float64)
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float64, experts_implementation="eager"
    )
    # W' W_down was rounded once to float32 (2^-24); everything else is float64
    difference = (hf(input_ids=source.probe_ids).logits - expected).norm() / expected.norm()
    assert difference < LAYERS * 2**-24
    assert hf.config.num_hidden_layers == LAYERS - 2


def test_the_vllm_ready_weights_are_stored_as_they_are_served(picos, tmp_path):
    source = make_source(picos["qwen2"])
    check = export(source, tmp_path, "vllm")["vllm"].verification["transformers"]
    vllm = load_file(tmp_path / "vllm" / "model.safetensors")
    assert {tensor.dtype for tensor in vllm.values()} == {torch.bfloat16}
    # the reference is rounded as they are
    assert check.relative_difference <= check.tolerance < 1e-5


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
        "from transformers import AutoModelForCausalLM; import torch;model = "
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'hf')!r});ids = torch.tensor([[5, "
        "6, 7, 8]]);texts = [model.generate(ids, max_new_tokens=8, do_sample=False, "
        "use_cache=c).tolist() for c in (True, False)];assert texts[0] == texts[1] and "
        "len(texts[0][0]) > 4; print('generated')"
    )
    command = [sys.executable, "-c", script]
    finished = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd="/", env=os.environ
    )
    assert finished.stdout.strip() == "generated", finished.stderr


def test_links_of_a_model_are_not_followed_out_of_it(picos, tmp_path):
    model = shutil.copytree(picos["llama"].directory, tmp_path / "model")
    (tmp_path / "id_rsa").write_text("secret")
    (model / "LICENSE").symlink_to("../id_rsa")
    source = Source(
        open_checkpoint(str(model)), None, None, {}, make_source(picos["llama"]).probe_ids
    )
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
        (model / name).write_text(
            json.dumps(contents | {"auto_map": {"AutoModelForCausalLM": "modeling_llama.X"}})
        )
    source = Source(
        open_checkpoint(str(model)), None, None, {}, make_source(picos["llama"]).probe_ids
    )
    export(source, tmp_path / "out", "hf")
    out = tmp_path / "out" / "hf"
    assert "gradmap does not know stay behind: notes.json" in capsys.readouterr().err
    assert not list(out.rglob("*.py"))
    assert (
        "auto_map"
        not in (out / "config.json").read_text() + (out / "tokenizer_config.json").read_text()
    )
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    verify_directory(out)


TOKENIZER_FILES = (
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "x.tiktoken",
    "tekken.json",
    "added_tokens.json",
)
OTHER_FILES = (
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "LICENSE.txt",
    "NOTICE",
)


@pytest.mark.parametrize("name", [*TOKENIZER_FILES, *OTHER_FILES])
def test_what_a_models_users_need_beside_its_weights_is_in_the_artifact(picos, tmp_path, name):
    model = shutil.copytree(picos["llama"].directory, tmp_path / "model")
    (model / name).write_text("{}")
    source = replace(make_source(picos["llama"]), checkpoint=open_checkpoint(str(model)))
    (tmp_path / "out").mkdir()
    writers.write_checkpoint(tmp_path / "out", source, writers.Storage("keep", None, 10**9))
    assert (tmp_path / "out" / name).read_text() == "{}"
    assert writers.left_behind(source.checkpoint) == []


def run_export_command(out, *arguments, preamble=""):
    script = (
        f"import sys; {preamble}\nfrom gradmap.cli import main\nsys.argv[1:1] = ['export']\nmain()"
    )
    command = [sys.executable, "-c", script, "--format", "hf", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_kill_in_the_middle_leaves_the_earlier_artifact_whole(picos, artifact, tmp_path):
    shutil.copytree(artifact[0], tmp_path / "hf")
    killer = (
        "import os, export.judging as a;"
        # everything is written, nothing is verified yet
        "a.run_artifact_in_each = lambda *_: os.kill(os.getpid(), 9)"
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
    weights["model.layers.4.mlp.down_proj.weight" if correction > 1 else "model.norm.weight"][0] = (
        weight
    )
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    source = make_source(Pico("llama", directory), correction)
    with pytest.raises(
        UserError, match=r"(norm|down_proj)\.weight.* does not fit in torch\.float16"
    ):
        export(source, tmp_path / "out", "hf", dtype="float16")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("damage", [torch.nan, -torch.inf])
def test_a_weight_that_is_no_number_is_named(picos, tmp_path, damage):
    directory = shutil.copytree(picos["llama"].directory, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.4.mlp.down_proj.weight"][1, 2] = damage
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    source = make_source(Pico("llama", directory))
    folded = plan_fold(
        source.checkpoint, picos["llama"].architecture, REMOVED, source.changes, torch.float16
    )
    with pytest.raises(UserError, match=r"down_proj\.weight.* holds NaN or infinity"):
        write_folded(tmp_path, folded, SHARD_BYTES)


@pytest.mark.parametrize("mistake", ["lost correction", "wrong layer"])
def test_a_wrong_artifact_is_refused_and_leaves_nothing(picos, tmp_path, monkeypatch, mistake):
    right = make_source(picos["llama"])

    def wrong_fold(checkpoint, architecture, removed, changes, *rest):
        if mistake == "lost correction":
            return plan_fold(checkpoint, architecture, removed, {}, *rest)
        return plan_fold(checkpoint, architecture, pairs(3, 2), changes, *rest)

    monkeypatch.setattr(writers, "plan_fold", wrong_fold)
    for name in ("hf", "vllm"):
        with pytest.raises(UserError, match="differ from the reference"):
            export(right, tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_patch_of_the_hidden_state_is_refused(picos, tmp_path):
    patch = {Place(0, HIDDEN_STATE): (Projection(2 * torch.eye(32)),)}
    with pytest.raises(UserError, match="no stock checkpoint can hold"):
        export(replace(make_source(picos["llama"]), changes=patch), tmp_path, "hf")


@pytest.mark.parametrize(
    ("family", "key"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")]
)
def test_a_model_of_fewer_positions_than_a_probe_is_exported(tmp_path, family, key):
    """Its position embeddings end there."""
    pico = make_pico(family, tmp_path / "pico", **{key: 32})
    check = export(open_source(pico.checkpoint, None), tmp_path / "out", "hf")["hf"].verification[
        "transformers"
    ]
    assert check.relative_difference <= check.tolerance
    assert verify_directory(tmp_path / "out" / "hf").verification["transformers"].greedy_tokens == 0


def test_an_unknown_format_or_a_foreign_directory_is_refused(picos, tmp_path):
    source = make_source(picos["llama"])
    with pytest.raises(UserError, match="Unknown format"):
        export(source, tmp_path, "exl2")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="will not be overwritten"):
        export(source, tmp_path, "hf")
    assert (tmp_path / "hf" / "mine.txt").read_text() == "keep"
