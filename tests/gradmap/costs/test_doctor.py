"""What is found of a machine, and how fast a model's own layer runs on it. Nothing is held against
a clock."""

import json
import math
from dataclasses import asdict
from unittest.mock import patch

import pynvml
import pytest
from transformers import CONFIG_MAPPING

from gradmap.common.errors import UserError
from gradmap.common.machine import Rates
from gradmap.costs import doctor, speed
from gradmap.costs.doctor import Gpu, Machine, examine_machine, find_gpus, machine_rows
from gradmap.costs.speed import Disk, measure_disk, measure_hardware
from gradmap.costs.steps import Hardware
from gradmap.model.checkpoint import read_config
from tests.conftest import SMOLLM2, SMOLLM2_GGUF
from tests.fake_nvml import Card, FakeNvml
from tests.families import config_of
from tests.gradmap.fake_gpu import fake_gpu

RATES = Rates({"float32": 100.0, "bfloat16": 400.0, "float16": 30.0})


@pytest.fixture
def rates(monkeypatch):
    monkeypatch.setattr(speed, "measure_cpu", lambda: RATES)


def complete(family, **changes):
    return CONFIG_MAPPING[family](**config_of(family) | changes).to_dict()


def test_a_machine_is_examined_and_what_is_found_can_be_written_as_json(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    # the real ones would slow this process down for good
    monkeypatch.setattr(doctor, "ISA_VARIABLES", ("GRADMAP_CACHE",))
    machine = examine_machine()
    assert machine.limits == {"GRADMAP_CACHE": str(tmp_path / "cache")}
    assert 1 <= machine.cores <= machine.all_cores
    assert 0 < machine.available_bytes <= machine.memory_bytes
    assert (
        set(machine.gflops) == {"float32", "bfloat16", "float16"}
        and min(machine.gflops.values()) > 0
    )
    assert machine.auto in ("autocast", "float32", "bfloat16")
    assert machine.bandwidth > 0 and machine.disk.write > 0 and machine.disk.read > 0
    assert {"torch", "transformers"} <= set(machine.packages)
    json.dumps(asdict(machine))
    assert list(tmp_path.iterdir()) == []  # neither a cache nor what was written to time the disk


def test_the_table_says_what_was_found():
    machine = Machine(
        cpu="A CPU",
        cores=2,
        all_cores=8,
        threads=1,
        isa="AVX2",
        limits={"ONEDNN_MAX_CPU_ISA": "AVX2"},
        memory_bytes=16 * 2**30,
        available_bytes=4 * 2**30,
        gpus=(Gpu("H100", 80 * 2**30, "9.0", True), Gpu("old", None, None, False)),
        device="cuda:0",
        gflops={"float32": 1234.0},
        auto="bfloat16",
        bandwidth=2e12,
        packages={"vllm": "0.32.0"},
        providers=(),
        disk=Disk("cache", 7 * 2**30, 1e8, 2e9),
    )
    rows = dict(machine_rows(machine))
    assert rows["cores"] == "2 of 8, torch takes 1"
    assert rows["instructions"] == "AVX2, ONEDNN_MAX_CPU_ISA=AVX2"
    assert rows["memory"] == "4.0 of 16.0 GiB available"
    assert rows["GPU 0"] == "H100, 80 GiB, capability 9.0"
    assert rows["GPU 1"] == "old, not visible"
    assert rows["products (GFLOP/s)"] == "float32 1,234"
    assert rows["vllm"] == "0.32.0" and rows["ONNX Runtime on"] == "not installed"
    assert rows["disk speed"] == "writes 100, reads 2,000 MB/s"


def test_gpus_are_listed_with_whether_cuda_shows_them(monkeypatch):
    FakeNvml((Card("GPU-aaaa"), Card("GPU-bbbb", capability=(7, 5)))).install(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda card: f"the {card.uuid}")
    gpus = find_gpus({"CUDA_VISIBLE_DEVICES": "1"})
    assert gpus == (
        Gpu("the GPU-aaaa", 80 * 2**30, "9.0", False),
        Gpu("the GPU-bbbb", 80 * 2**30, "7.5", True),
    )


def test_without_onnx_runtime_there_are_no_providers():
    with patch.dict("sys.modules", {"onnxruntime": None}):
        assert doctor.find_providers() == ()


def test_a_disk_is_timed_where_the_cache_will_be_and_left_as_it_was(tmp_path):
    disk = measure_disk(tmp_path / "not" / "yet")
    assert disk.directory == str(tmp_path / "not" / "yet")
    assert disk.free_bytes > 0 and disk.write > 0 and disk.read > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "autocast"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2_moe", "opt", "gpt2"])
def test_one_layer_of_the_model_s_own_shape_is_timed(rates, family, dtype):
    hardware = measure_hardware(complete(family), dtype, "cpu")
    assert hardware.efficiency == 1 and 0 < hardware.flops < math.inf
    assert 0 < hardware.single_token_share < math.inf
    assert hardware.head_cost >= 1
    assert (hardware.weight_bytes, hardware.state_bytes) == (
        (4, 4) if dtype == "float32" else (2, 4)
    )


def test_what_is_timed_has_one_layer_and_no_weights_of_the_model_s_size():
    model, shape = speed._one_layer(complete("qwen3_moe", vocab_size=10**6), "float32", "cpu")
    assert (model.config.num_hidden_layers, shape.layers, shape.vocabulary) == (
        1,
        1,
        speed.VOCABULARY,
    )
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "rate"), [("float32", 1e11), ("autocast", 4e11), ("float64", 5e10)]
)
def test_a_layer_that_is_too_large_gets_a_share_of_what_products_reach(rates, dtype, rate):
    config = complete("llama", hidden_size=2**14, intermediate_size=2**16, num_attention_heads=128)
    hardware = measure_hardware(config, dtype, "cpu")
    assert hardware.sustained_flops == speed.LAYER_SHARE * rate
    assert hardware.single_token_share == speed.SINGLE_TOKEN_SHARE


def test_on_a_gpu_the_gpu_is_timed(monkeypatch):
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    known = Hardware("cuda:0", flops=1.0, bandwidth=1.0, memory=1.0)
    with fake_gpu() as gpu, gpu.traffic() as traffic:
        timed = speed.time_model(complete("llama"), "bfloat16", known)
        assert speed.memory_bandwidth("cuda:0") > 0
    assert timed.flops > 1 and timed.single_token_share > 0
    assert traffic.copied_bytes < 10**4  # nothing is computed on the CPU


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_a_config_is_read_without_weights(picos, tmp_path, family):
    (tmp_path / "config.json").write_text((picos[family].directory / "config.json").read_text())
    config = read_config(str(tmp_path))
    assert config["model_type"] == family
    assert "tie_word_embeddings" in config  # a default of the family


def test_a_gguf_s_config_is_read_without_converting_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path))
    config = read_config(str(SMOLLM2), SMOLLM2_GGUF)
    assert (config["num_hidden_layers"], config["hidden_size"]) == (30, 576)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_cannot_be_pruned_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"]})
    )
    with pytest.raises(UserError, match="not a causal language model"):
        read_config(str(tmp_path))
    with pytest.raises(UserError, match=r"none\.gguf does not exist"):
        read_config(str(tmp_path), "none.gguf")
