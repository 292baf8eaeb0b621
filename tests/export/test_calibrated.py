"""Weights that llm-compressor rounds by what samples make of them (`make compressor`)."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from export import calibrated
from export.artifact import open_source
from export.calibrated import Scheme, group_size
from export.choices import choose_storage
from export.options import ExportOptions
from export.writers import JUDGING_SAMPLES
from gradmap.common.errors import UserError
from gradmap.pruning.plan import save_plan
from tests.conftest import make_pico
from tests.export.conftest import put_on_path
from tests.export.sources import export, make_source, with_samples
from tests.families import LAYERS, config_of


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    """One whose maps have inputs that 32 divides."""
    return make_pico("llama", tmp_path_factory.mktemp("pico"), hidden_size=64, intermediate_size=96)


@pytest.mark.parametrize(("quantise", "nearest"), [("w4a16", None), ("int8-gptq", "int8")])
def test_what_is_calibrated_is_near_the_pruned_model(compressor, pico, tmp_path, quantise, nearest):
    source = with_samples(make_source(pico), samples=64)
    record = export(source, tmp_path, "vllm", quantise=quantise, min_agreement=0)["vllm"]
    check = record.verification["transformers"]
    assert check.positions == JUDGING_SAMPLES * 20
    # of a random model, whose logits are close to each other
    assert check.argmax_agreement > {"w4a16": 0.4, "int8-gptq": 0.8}[quantise]
    assert record.calibration == source.calibration and record.layers == LAYERS - 2
    if nearest:  # what looks at no samples, and rounds each weight by itself
        by_itself = export(source, tmp_path / "by", "vllm", quantise=nearest, min_agreement=0)
        assert by_itself["vllm"].calibration is None
        assert check.divergence < by_itself["vllm"].verification["transformers"].divergence
    require_stored_as(tmp_path / "vllm", {"w4a16": (4, 32), "int8-gptq": (8, None)}[quantise])
    assert record.weight_bytes == (tmp_path / "vllm" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("family", "smoothed"), [("llama", True), ("opt", True), ("gemma", False)])
def test_gains_take_what_makes_activations_easier_to_round(compressor, tmp_path, family, smoothed):
    """Where a norm's gain is its weight: Gemma's is one more, and stays what it is."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "ffn_dim": 96, "head_dim": 16}
    if family == "opt":
        sizes |= {"word_embed_proj_dim": 64}
    source = with_samples(make_source(make_pico(family, tmp_path / "pico", **sizes)))
    asked = {"quantise": "int8-gptq", "min_agreement": 0.5}
    export(source, tmp_path, "vllm", **asked)
    export(source, tmp_path, "hf", dtype="bfloat16")
    quantised, whole = (load_file(tmp_path / form / "model.safetensors") for form in ("vllm", "hf"))
    gains = {name for name in whole if re.search(r"layers\.\d\..*norm\.weight", name)}
    changed = {
        name
        for name in gains
        # llm-compressor adds Gemma's one and takes it away again, in bfloat16
        if not torch.allclose(quantised[name], whole[name], rtol=0, atol=2**-7)
    }
    assert len(gains) == 2 * (LAYERS - 2)
    assert changed == (gains if smoothed else set())


def require_stored_as(directory, bits_and_group):
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert config["quant_method"] == "compressed-tensors"
    assert (weights["num_bits"], weights["group_size"]) == bits_and_group
    stored = load_file(directory / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert sum("proj.weight_scale" in name for name in stored) == 7 * (LAYERS - 2)
    assert not list(directory.glob(".*"))


def test_the_maps_of_all_experts_get_four_bits_and_what_chooses_them_keeps_its_own(
    compressor, tmp_path
):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    sizes |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    source = with_samples(make_source(make_pico("qwen2_moe", tmp_path / "pico", **sizes)))
    record = export(source, tmp_path, "vllm", quantise="w4a16", min_agreement=0)["vllm"]
    export(source, tmp_path, "hf", dtype="bfloat16")
    quantised, whole = (load_file(tmp_path / form / "model.safetensors") for form in ("vllm", "hf"))
    packed = {name.removesuffix("_packed") for name in quantised if name.endswith(".weight_packed")}
    kept = set(whole) & set(quantised)
    assert packed == set(whole) - kept
    assert sum(".experts.5." in name for name in packed) == 3 * (LAYERS - 2)
    of_layers = {name for name in kept if "layers" in name and whole[name].dim() == 2}
    assert {name.split(".", 3)[-1] for name in of_layers} == {
        "mlp.gate.weight",
        "mlp.shared_expert_gate.weight",
    }
    check = record.verification["transformers"]
    assert check.argmax_agreement > 0.4 and check.divergence < 0.1


@pytest.fixture
def plan_directory(pico, tmp_path):
    source = with_samples(make_source(pico))
    plan = source.plan.model_copy(update={"calibration": source.calibration})
    save_plan(tmp_path / "plan", plan, {}, source.samples)
    return tmp_path / "plan"


def test_a_dense_model_is_calibrated_on_the_samples_of_a_plan(
    compressor, pico, plan_directory, tmp_path
):
    source = open_source(pico.checkpoint, None, plan_directory)
    assert (source.plan, source.removed, source.changes) == (None, (), {})
    record = export(source, tmp_path, "vllm", quantise="w4a16", min_agreement=0)["vllm"]
    assert record.layers == LAYERS and record.plan is None
    assert record.calibration.source == "random"
    assert record.verification["transformers"].positions == JUDGING_SAMPLES * 20
    card = (tmp_path / "vllm" / "README.md").read_text()
    assert "quantised to w4a16 on 16 samples of random" in card
    with pytest.raises(UserError, match="leave out --samples-of"):
        open_source(pico.checkpoint, plan_directory, plan_directory)


def test_without_samples_to_calibrate_on_nothing_is_computed(compressor, pico, tmp_path):
    dense = replace(make_source(pico), plan=None, plan_hash=None, changes={})
    with pytest.raises(UserError, match=r"name a plan of this model .*--samples-of"):
        export(dense, tmp_path, "vllm", quantise="w4a16")
    few = with_samples(make_source(pico), samples=JUDGING_SAMPLES)
    with pytest.raises(UserError, match="the plan has 8 in all; make one with more"):
        export(few, tmp_path, "vllm", quantise="int8-gptq")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_calibrated_is_refused_before_the_work(picos, pico, monkeypatch):
    asked = ExportOptions(formats=["vllm"], quantise="w4a16", check_vllm=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"llmcompressor\.trace; install it .*pipx install llmcomp"):
        choose_storage("vllm", asked, pico.checkpoint.config)
    put_on_path(monkeypatch, "compressor")
    with pytest.raises(UserError, match="have 32, 40 inputs, not all of which 32 divides"):
        choose_storage("vllm", asked, picos["llama"].checkpoint.config)
    with pytest.raises(UserError, match="mixture of experts"):
        choose_storage("vllm", asked, picos["mixtral"].checkpoint.config)
    with pytest.raises(UserError, match="have 16, 24, 32, 40 inputs, not all of which 32 divides"):
        choose_storage("vllm", asked, picos["qwen2_moe"].checkpoint.config)


def test_a_failure_of_llm_compressor_is_said_in_its_words(compressor, pico, tmp_path, monkeypatch):
    monkeypatch.setitem(calibrated.SCHEMES, "w4a16", Scheme("W4A17", grouped=True))
    source = with_samples(make_source(pico))
    with pytest.raises(UserError, match=r"llm-compressor cannot quantise this model: .*W4A17"):
        export(source, tmp_path, "vllm", quantise="w4a16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("width", "inner", "size"), [(256, 128, 128), (64, 192, 64), (576, 1536, 64), (96, 32, 32)]
)
def test_groups_are_as_large_as_every_map_allows(width, inner, size):
    sizes = {"hidden_size": width, "intermediate_size": inner}
    config = {"model_type": "llama"} | config_of("llama") | sizes
    assert group_size(config) == size
