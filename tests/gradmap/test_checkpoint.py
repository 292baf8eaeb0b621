"""A model that cannot be pruned rightly is refused, with the reason, before anything is loaded."""

import json
import shutil

import pytest

from gradmap.checkpoint import open_checkpoint
from gradmap.errors import UserError


@pytest.fixture
def broken(picos, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(picos["llama"].directory, directory)
    return directory


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantise afterwards"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "not a causal language model"),
        ({"is_encoder_decoder": True}, "not a causal language model"),
        ({"auto_map": {"AutoModelForCausalLM": "x.py"}}, "remote code"),
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
