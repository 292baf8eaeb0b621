"""Pickled weights are converted only on request, and never run what they hold."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gradmap.common.errors import UserError
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.loading import load_tokenizer


def pickle_weights(directory):
    """Replaces the safetensors file by two pickles, as old checkpoints have them."""
    tensors = sorted(load_file(directory / "model.safetensors").items())
    for number, part in enumerate((tensors[:9], tensors[9:]), start=1):
        torch.save(dict(part), directory / f"pytorch_model-{number:05}-of-00002.bin")
    (directory / "model.safetensors").unlink()


@dataclass
class Malicious:
    trace: Path

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickled_weights_are_converted_only_on_request(picos, broken, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    pickle_weights(broken)
    with pytest.raises(UserError, match="--allow-pickle"):
        open_checkpoint(str(broken))
    converted = open_checkpoint(str(broken), allow_pickle=True)
    original = load_file(picos["llama"].directory / "model.safetensors")
    stored = {
        name: tensor for path in converted.weight_files for name, tensor in load_file(path).items()
    }
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in original)
    assert load_tokenizer(converted.directory)("w5")["input_ids"] == [5]


def test_what_was_converted_is_of_this_config_and_tokenizer_too(broken, tmp_path, monkeypatch):
    """Two checkpoints may have the same weights."""
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    pickle_weights(broken)
    first = open_checkpoint(str(broken), allow_pickle=True)
    assert open_checkpoint(str(broken), allow_pickle=True).directory == first.directory
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    second = open_checkpoint(str(broken), allow_pickle=True)
    assert (first.config["rms_norm_eps"], second.config["rms_norm_eps"]) == (
        config["rms_norm_eps"],
        0.5,
    )


def test_what_was_converted_and_then_changed_is_converted_again(broken, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    pickle_weights(broken)
    weights = open_checkpoint(str(broken), allow_pickle=True).weight_files[0]
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    open_checkpoint(str(broken), allow_pickle=True)
    assert weights.read_bytes() == before


def test_what_was_converted_is_of_each_of_these_weight_files(broken, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    pickle_weights(broken)
    open_checkpoint(str(broken), allow_pickle=True)
    second = broken / "pytorch_model-00002-of-00002.bin"
    tensors = torch.load(second, weights_only=True)
    tensors["model.norm.weight"] += 1
    torch.save(tensors, second)
    files = open_checkpoint(str(broken), allow_pickle=True).weight_files
    stored = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert torch.equal(stored["model.norm.weight"], tensors["model.norm.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "x.tiktoken",
        "vocab.txt",
        "x.model",
    ],
)
def test_what_lies_beside_pickled_weights_comes_along(broken, tmp_path, monkeypatch, name):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    pickle_weights(broken)
    (broken / name).parent.mkdir(exist_ok=True)
    (broken / name).write_text("{{ messages }}")
    converted = open_checkpoint(str(broken), allow_pickle=True).directory
    assert (converted / name).read_text() == "{{ messages }}"


def test_a_pickle_that_calls_code_is_refused_even_then(broken, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    trace = tmp_path / "executed"
    (broken / "model.safetensors").unlink()
    torch.save({"weight": Malicious(trace)}, broken / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        open_checkpoint(str(broken), allow_pickle=True)
    assert not trace.exists()


def test_pickles_of_the_old_format_are_read(picos, broken, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    tensors = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(tensors, broken / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    converted = open_checkpoint(str(broken), allow_pickle=True)
    assert load_file(converted.weight_files[0]).keys() == tensors.keys()


@pytest.mark.parametrize(
    "wrap", [lambda tensors: {"state_dict": tensors}, lambda tensors: list(tensors.values())]
)
def test_pickles_of_other_things_than_tensors_by_name_are_refused(
    broken, tmp_path, monkeypatch, wrap
):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    torch.save(wrap(load_file(broken / "model.safetensors")), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"save the model's state_dict\(\) alone"):
        open_checkpoint(str(broken), allow_pickle=True)
