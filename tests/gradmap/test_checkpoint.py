"""A model that cannot be pruned rightly is refused, with the reason, before anything is loaded."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gradmap.checkpoint import load_tokenizer, open_checkpoint
from gradmap.errors import UserError


@pytest.fixture
def broken(picos, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(picos["llama"].directory, directory)
    return directory


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantise afterwards"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "not a causal language model"),
        ({"is_encoder_decoder": True}, "not a causal language model"),
        ({"auto_map": {"AutoModelForCausalLM": "x.py"}, "architectures": ["MyForCausalLM"]}, "remote code"),
        ({"model_type": "mamba"}, "not supported"),
    ],
)
def test_unsuitable_models_are_refused(broken, changes, message):
    change_config(broken, **changes)
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(broken))


def test_a_truncated_weight_file_is_named(broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors has \d+ bytes where its header says \d+"):
        open_checkpoint(str(broken))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file"):
        open_checkpoint(str(broken))


def test_code_that_transformers_does_not_need_is_no_obstacle(broken):
    change_config(broken, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert open_checkpoint(str(broken)).config["model_type"] == "llama"


def test_pickled_weights_are_converted_only_on_request(picos, broken, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    pickle_weights(broken)
    with pytest.raises(UserError, match="--allow-pickle"):
        open_checkpoint(str(broken))
    converted = open_checkpoint(str(broken), allow_pickle=True)
    original = load_file(picos["llama"].directory / "model.safetensors")
    stored = {name: tensor for path in converted.weight_files for name, tensor in load_file(path).items()}
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in original)
    assert load_tokenizer(converted.directory)("w5")["input_ids"] == [5]


def test_a_pickle_that_calls_code_is_refused_even_then(broken, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    trace = tmp_path / "executed"
    (broken / "model.safetensors").unlink()
    torch.save({"weight": Malicious(trace)}, broken / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        open_checkpoint(str(broken), allow_pickle=True)
    assert not trace.exists()


def test_missing_parts_are_named(broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        open_checkpoint(str(broken))
    (broken / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"lacks the weight file model\.safetensors"):
        open_checkpoint(str(broken))
    (broken / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        open_checkpoint(str(broken))
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it into its base model"):
        open_checkpoint(str(broken))


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/such/model"])
def test_a_missing_model_is_refused(name):
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(name)


def test_a_hub_model_that_cannot_be_fetched_is_refused():
    with pytest.raises(UserError, match="could not be fetched"):
        open_checkpoint("no-such-org/no-such-model")
