"""What removal promises for every family: the smaller model that is saved is the smaller model that
was in memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.writers import Storage, write_checkpoint
from gradmap.model.configs import layer_count
from gradmap.model.layered import LayeredModel
from tests.conftest import FAMILIES, make_pico
from tests.export.sources import REMOVED, SHIFTED, WITHOUT_US, make_source
from tests.families import LAYERS, MORE_CONFIGS
from tests.gradmap.removals import attention, ffn, pairs

# Layers, then pairs that leave a layer of two: next to another that goes, around one that is gone,
# and one that goes itself.
REMOVALS = {
    "layers": REMOVED,
    "shifted": SHIFTED,
    "around": pairs(2, "M1+A3"),
    "joined": pairs("M1+A2", "A1+M2"),
}
NEW_TOKENS = 12  # more than the window of sliding attention, with the prompt
SCRIPT = (
    WITHOUT_US
    + """
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
ids = load_file(root / "ids.safetensors")["ids"]
for directory in filter(Path.is_dir, root.iterdir()):
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager"
    )
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    made = {"logits": model(input_ids=ids).logits}
    for use in (True, False):
        made[f"cache_{use}"] = model.generate(ids[:1], use_cache=use, **options)
    save_file(made, root / f"{directory.name}.safetensors")
""".replace("NEW", str(NEW_TOKENS))
)


# Whose attention and FFN are not one behind the other in every layer, or not of one kind.
UNPAIRED = ("cohere", "cohere2", "phi", "gpt_neox", "falcon", "bloom", "mpt", "llama4_text")
CASES = [
    (family, what)
    for family in (*FAMILIES, *MORE_CONFIGS)
    for what in REMOVALS
    if what == "layers" or family not in UNPAIRED
]


@pytest.fixture(scope="module")
def all_picos(picos, tmp_path_factory):
    root = tmp_path_factory.mktemp("more")
    return picos | {family: make_pico(family, root / family) for family in MORE_CONFIGS}


@pytest.fixture(scope="module")
def reloaded(all_picos, tmp_path_factory):
    """The pruned models of every family, saved and then loaded by a process that knows nothing of
    gradmap."""
    root = tmp_path_factory.mktemp("contract")
    sources = {
        f"{family}-{what}": make_source(all_picos[family], removed=REMOVALS[what])
        for family, what in CASES
    }
    probe_ids = next(iter(sources.values())).probe_ids
    save_file({"ids": probe_ids.contiguous()}, root / "ids.safetensors")
    for name, source in sources.items():
        (root / name).mkdir()
        write_checkpoint(root / name, source, Storage("keep", None, 10**9))
    command = [sys.executable, "-c", SCRIPT, str(root)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert finished.returncode == 0, finished.stderr[-3000:]
    return root, sources


@pytest.mark.parametrize(("family", "what"), CASES)
class TestContract:
    def test_logits_are_those_of_the_model_in_memory(self, all_picos, reloaded, family, what):
        root, sources = reloaded
        source, model = sources[f"{family}-{what}"], all_picos[family].load()
        with LayeredModel.of(model).changed(source.changes, without=source.removed):
            expected = model(input_ids=source.probe_ids).logits
        actual = load_file(root / f"{family}-{what}.safetensors")["logits"]
        # W' W_down was rounded once to float32 (2^-24); everything else is float64
        assert (actual - expected).norm() / expected.norm() < LAYERS * 2**-24

    def test_it_generates_with_its_cache_what_it_generates_without(self, reloaded, family, what):
        root, sources = reloaded
        stored = load_file(root / f"{family}-{what}.safetensors")
        assert torch.equal(stored["cache_True"], stored["cache_False"])
        prompt = sources[f"{family}-{what}"].probe_ids
        assert stored["cache_True"].shape[1] == prompt.shape[1] + NEW_TOKENS

    def test_every_per_layer_field_of_the_config_follows(self, all_picos, reloaded, family, what):
        """What is of the attention follows that, and what is of the FFN follows that."""
        config = json.loads((reloaded[0] / f"{family}-{what}" / "config.json").read_text())
        whole = all_picos[family].checkpoint.config
        gone = {sublayer for pair in REMOVALS[what] for sublayer in pair}
        attentions, ffns = (
            [index for index in range(LAYERS) if of(index) not in gone] for of in (attention, ffn)
        )
        assert layer_count(config) == len(attentions) == len(ffns)
        if "layer_types" in whole:
            assert config["layer_types"] == [whole["layer_types"][index] for index in attentions]
        if whole.get("use_sliding_window"):
            full = [index for index in attentions if index < whole["max_window_layers"]]
            assert config["max_window_layers"] == len(full)
        if whole.get("mlp_only_layers"):
            dense = [
                position for position, index in enumerate(ffns) if index in whole["mlp_only_layers"]
            ]
            assert config["mlp_only_layers"] == dense
