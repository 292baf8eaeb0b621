"""A model that cannot be pruned rightly is refused, with the reason, before anything is loaded."""

import json
import struct

import pytest
from safetensors.torch import load_file, save_file

from gradmap.common.errors import UserError
from gradmap.model.checkpoint import open_checkpoint, read_config
from gradmap.model.model_files import INDEX_NAME


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantise afterwards"),
        (
            {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
            "not a causal language model",
        ),
        ({"is_encoder_decoder": True}, "not a causal language model"),
        (
            {"auto_map": {"AutoModelForCausalLM": "x.py"}, "architectures": ["MyForCausalLM"]},
            "remote code",
        ),
        ({"model_type": "mystery"}, "not one that transformers knows"),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}},
            "more than text .*save its language model as a checkpoint of its own",
        ),
        ({"model_type": ["llama"]}, "model_type: Input should be a valid string"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: Input should be a valid list"),
        ({"num_hidden_layers": "5"}, "num_hidden_layers is '5', where a count is expected"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None, where a count is expected"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, where a count is expected"),
        ({"vocab_size": "200"}, "vocab_size is '200', where a count is expected"),
        (
            {"vocab_size": 10_000},
            r"have in another shape .*embed_tokens\.weight \(\d+, \d+\) instead of \(10000, ",
        ),
        ({"hidden_size": "wide"}, "cannot be built as its config.json describes it"),
        ({"num_attention_heads": 0}, "cannot be built as its config.json describes it"),
        ({"rope_parameters": {"rope_type": "unheard", "rope_theta": 1.0}}, "cannot be built"),
    ],
)
def test_unsuitable_models_are_refused(broken, changes, message):
    change_config(broken, **changes)
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(broken))


def change_weights(directory, change):
    """change: from the name of a tensor to its new one, or None where it goes."""
    tensors = load_file(directory / "model.safetensors")
    renamed = {change(name): tensor for name, tensor in tensors.items() if change(name) is not None}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


def without(ending):
    return lambda name: None if name.endswith(ending) else name


def quantised(name):
    """As GPTQ stores it, with no word of it in the config."""
    return name.replace("down_proj.weight", "down_proj.qweight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: f"_orig_mod.{name}", r"they lack .*; they also hold _orig_mod\."),
        (without("lm_head.weight"), r"they lack lm_head\.weight\."),
        (
            without("layers.2.mlp.down_proj.weight"),
            r"they lack model\.layers\.2\.mlp\.down_proj\.weight\.",
        ),
        (
            quantised,
            r"they lack .*down_proj\.weight.* and \d+ more; they also hold .*down_proj\.qweight",
        ),
        (
            lambda name: name.replace("layers.4.", "layers.5."),
            r"they lack model\.layers\.4\..*also hold model\.layers\.5\.",
        ),
    ],
    ids=["compiled", "no head", "no down projection", "quantised", "layer out of range"],
)
def test_weights_that_are_not_the_configs_are_refused(broken, change, message):
    """transformers would fill the gaps with random values."""
    change_weights(broken, change)
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(broken))


def test_a_runtime_that_may_read_quantised_weights_gets_no_incomplete_ones(broken):
    change_weights(broken, without("lm_head.weight"))
    with pytest.raises(UserError, match=r"they lack lm_head\.weight\."):
        open_checkpoint(str(broken), allow_quantised=True)


def test_a_single_weight_file_counts_before_a_stale_index(broken):
    (broken / INDEX_NAME).write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )
    assert [path.name for path in open_checkpoint(str(broken)).weight_files] == [
        "model.safetensors"
    ]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../model.safetensors"}, "no plain name"),
        ({"x": "/etc/passwd"}, "no plain name"),
        ({"x": 1}, "weight_map.x"),
        ([], "weight_map"),
        ({"x": "other.safetensors"}, "lacks the weight file other.safetensors"),
    ],
)
def test_an_index_names_weight_files_of_the_directory(broken, weight_map, message):
    (broken / "model.safetensors").rename(broken / "kept.safetensors")
    (broken / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(broken))


def split_weights(directory):
    """Replaces the weight file by a/part.safetensors and b/part.safetensors, with their index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for index, name in enumerate(tensors):
        weight_map[name] = f"{'ab'[index % 2]}/part.safetensors"
    for folder in "ab":
        (directory / folder).mkdir()
        part = {name: tensors[name] for name in weight_map if weight_map[name].startswith(folder)}
        save_file(part, directory / folder / "part.safetensors", metadata={"format": "pt"})
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_weight_files_may_lie_in_folders_and_are_hashed_by_their_paths(broken):
    split_weights(broken)
    assert set(open_checkpoint(str(broken)).file_hashes) == {
        "config.json",
        "a/part.safetensors",
        "b/part.safetensors",
    }


@pytest.mark.parametrize("folder", ["a", "b"])
def test_each_of_several_weight_files_is_checked(broken, folder):
    split_weights(broken)
    path = broken / folder / "part.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=rf"{folder}/part\.safetensors has \d+ bytes where its header says \d+"
    ):
        open_checkpoint(str(broken))


def test_a_weight_file_is_no_link_to_another_place(broken, tmp_path):
    split_weights(broken)
    path = broken / "b" / "part.safetensors"
    path.rename(tmp_path / "private.safetensors")
    path.symlink_to(tmp_path / "private.safetensors")
    with pytest.raises(UserError, match=r"b/part\.safetensors is a link out of the directory"):
        open_checkpoint(str(broken))


def test_a_config_without_architectures_is_of_its_model_type(broken):
    change_config(broken, architectures=None)
    assert open_checkpoint(str(broken)).config["architectures"] == ["LlamaForCausalLM"]


def test_a_link_to_another_place_is_not_read(broken, tmp_path):
    (broken / "tokenizer_config.json").unlink()
    (tmp_path / "private.json").write_text("{}")
    (broken / "tokenizer_config.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(UserError, match="is a link out of the directory"):
        open_checkpoint(str(broken))


def test_a_config_is_no_link_to_another_place(broken, tmp_path):
    (broken / "config.json").rename(tmp_path / "private.json")
    (broken / "config.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(UserError, match=r"config\.json is a link out of the directory"):
        read_config(str(broken))


def test_a_weight_file_with_more_than_its_header_says_is_named(broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(
        UserError, match=r"model\.safetensors has \d+ bytes where its header says \d+"
    ):
        open_checkpoint(str(broken))


def test_a_truncated_weight_file_is_named(broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"model\.safetensors has \d+ bytes where its header says \d+"
    ):
        open_checkpoint(str(broken))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file"):
        open_checkpoint(str(broken))


def test_code_that_transformers_does_not_need_is_no_obstacle(broken):
    change_config(broken, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert open_checkpoint(str(broken)).config["model_type"] == "llama"


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


def header_of(entry):
    return json.dumps({"x": entry}).encode()


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b'{"x": 1}',
        header_of({"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}),
        header_of({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}),
        header_of({"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}),
        header_of({"dtype": 1, "shape": [1], "data_offsets": [0, 4]}),
        header_of({"shape": [1], "data_offsets": [0, 4]}),
    ],
)
def test_a_damaged_header_of_weights_is_one_sentence(broken, header):
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(
        UserError, match=r"model\.safetensors is not a safetensors file, or is cut short"
    ):
        open_checkpoint(str(broken))
