"""What llama.cpp makes of a GGUF file, and computes from it (`make consumers`)."""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM

from export import GGUF_FILE
from export.choices import choose_storage
from export.far_positions import require_far_positions
from export.foreign import ForeignEnvironment
from export.formats import FORMATS
from export.gguf_file import (
    importance_matrix,
    mean_squares_of_inputs,
    mean_squares_of_inputs_reference,
)
from export.options import ExportOptions
from export.writers import Storage
from gradmap.common.errors import UserError
from tests.conftest import make_pico
from tests.export.conftest import put_on_path
from tests.export.sources import export, make_source, with_samples
from tests.families import LAYERS
from tests.gradmap.removals import pairs

# llama.cpp's blocks of k-quants have 256 weights.
BLOCK = 256


def with_its_tokenizer(smollm2, pico):
    """The converter knows the tokenizers of real models alone."""
    for path in smollm2.directory.glob("*token*"):
        shutil.copy(path, pico.directory)
    return pico


@pytest.fixture(scope="module")
def pico(tmp_path_factory, smollm2):
    sizes = {"vocab_size": 49152, "hidden_size": BLOCK, "intermediate_size": BLOCK}
    return with_its_tokenizer(smollm2, make_pico("llama", tmp_path_factory.mktemp("pico"), **sizes))


def test_llama_cpp_itself_reproduces_the_pruned_model(llama_cpp, pico, tmp_path):
    record = export(make_source(pico), tmp_path, "gguf", dtype="float32")["gguf"]
    check = record.verification["llama_cpp"]
    assert check.runtime.startswith("llama-cpp-python ")
    assert check.tolerance < 0.01
    # SiLU, unlike GELU, is computed in float32
    assert 0 < check.relative_difference < 1e-4 and check.cached_difference < 1e-4
    assert check.greedy_identical == check.greedy_tokens > 0


def test_both_runtimes_know_which_layers_of_a_pruned_model_have_a_window(
    llama_cpp, smollm2, tmp_path
):
    """Not those that the family has by default, and with the window goes another rope."""
    made = make_pico("gemma3_text", tmp_path / "pico", vocab_size=49152)
    source = make_source(with_its_tokenizer(smollm2, made), removed=pairs(1))
    record = export(source, tmp_path, "gguf")["gguf"]
    kinds = json.loads((tmp_path / "gguf" / "config.json").read_text())["layer_types"]
    assert kinds == ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert record.dtype == "float16" and set(record.verification) == {"transformers", "llama_cpp"}
    for check in record.verification.values():
        assert check.typical_difference <= check.tolerance < 0.02


def read_tensors(directory):
    return {tensor.name: tensor for tensor in GGUFReader(directory / GGUF_FILE).tensors}


@pytest.fixture(scope="module")
def quantised(pico, tmp_path_factory):
    """Two artifacts in q4_k_m: with a look at samples, and without."""
    with pytest.MonkeyPatch.context() as patch:
        put_on_path(patch, "consumers")
        out = tmp_path_factory.mktemp("quantised")
        blind = replace(make_source(pico), changes={})  # with them, rounding decides everything
        seeing = with_samples(blind, samples=40)
        records = {}
        for name, source in {"seeing": seeing, "blind": blind}.items():
            asked = {"quantise": "q4_k_m", "min_agreement": 0}
            records[name] = export(source, out / name, "gguf", **asked)["gguf"]
    return seeing, records, {name: out / name / "gguf" for name in records}


def test_k_quants_are_made_and_judged_by_llama_cpp(quantised):
    source, records, directories = quantised
    record = records["seeing"]
    assert record.verification.keys() == {"transformers", "llama_cpp"}
    for check in record.verification.values():
        assert check.positions == len(source.quantised_probe_ids.flatten()) == 160
        # a random model makes much of a rounding; by chance, they would agree at one of 49152
        assert check.argmax_agreement > 0.1 and 0 < check.divergence < 1
        assert check.perplexity_ratio == pytest.approx(1, abs=0.2)
    kinds = Counter(
        tensor.tensor_type.name for tensor in read_tensors(directories["seeing"]).values()
    )
    assert kinds["Q4_K"] >= 4 * (LAYERS - 2) and kinds["Q6_K"] >= 1
    size = (directories["seeing"] / GGUF_FILE).stat().st_size
    assert record.weight_bytes == size < 2 * record.parameters
    assert record.calibration == source.calibration and records["blind"].calibration is None


def test_inputs_that_weigh_more_are_rounded_better(quantised, llama_cpp, tmp_path):
    """llama.cpp is told how much each weighs, by the names of its own tensors."""
    source, _, directories = quantised
    export(source, tmp_path, "hf", "gguf", dtype="float32")
    whole = read_tensors(tmp_path / "gguf")
    importances = importance_matrix(tmp_path / "hf", tmp_path / "gguf" / GGUF_FILE, source.fit_ids)
    maps = {name for name in whole if name.startswith("blk.") and "norm" not in name}
    assert importances.keys() == maps and len(maps) == 7 * (LAYERS - 2)

    def error(directory):
        rounded = read_tensors(directory)
        return sum(
            (values.numpy() * (as_numbers(rounded[name]) - as_numbers(whole[name])) ** 2).sum()
            for name, values in importances.items()
        )

    assert error(directories["seeing"]) < error(directories["blind"])


def as_numbers(tensor):
    return dequantize(tensor.data, tensor.tensor_type)


def test_importances_are_the_mean_squares_of_what_enters(pico):
    model = AutoModelForCausalLM.from_pretrained(pico.directory, dtype=torch.float64).eval()
    samples = torch.randint(200, (3, 7), generator=torch.Generator().manual_seed(1))
    paths = ["model.layers.0.mlp.down_proj", "model.layers.4.self_attn.q_proj"]
    maps = [model.get_submodule(path) for path in paths]
    fast = mean_squares_of_inputs(model, maps, samples)
    for path, module in zip(paths, maps, strict=True):
        slow = mean_squares_of_inputs_reference(model, path, samples)
        assert torch.allclose(fast[module], slow, rtol=21 * 2**-52, atol=0)
        assert not module._forward_pre_hooks


def test_without_llama_cpp_there_is_no_gguf(llama_cpp, pico, monkeypatch):
    """Not even with its converter: nothing could tell what the file computes."""
    monkeypatch.setattr(ForeignEnvironment, "has", lambda *_: False)
    with pytest.raises(UserError, match=r"checked by llama\.cpp itself.*pipx inject convert-hf"):
        choose_storage("gguf", ExportOptions(formats=["gguf"]), pico.checkpoint.config)


NEAR = {"vocab_size": 49152, "max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("family", "changes", "lost"),
    [
        ("llama", {"rope_parameters": YARN}, None),
        # which of the layers that are left have a window, llama.cpp would take from what it knows
        # of the family
        ("gemma3_text", {"sliding_window": 96}, None),
        ("mistral", {"sliding_window": 96}, "sliding_window (96 tokens): in llama-cpp-python"),
    ],
)
def test_far_into_a_text_llama_cpp_says_what_a_file_keeps(
    llama_cpp, smollm2, tmp_path, family, changes, lost
):
    made = with_its_tokenizer(smollm2, make_pico(family, tmp_path, **NEAR, **changes))
    form, storage = FORMATS["gguf"], Storage("float32", None, 10**9)
    if lost is None:
        require_far_positions(make_source(made), form, storage, form.runners)
        return
    with pytest.raises(UserError, match=re.escape(lost)):
        require_far_positions(make_source(made), form, storage, form.runners)


def test_an_environment_is_asked_for_its_modules(tmp_path, monkeypatch):
    """As pipx leaves it: a link on PATH into an environment with a Python of its own."""
    environment, programs = tmp_path / "environment" / "bin", tmp_path / "programs"
    for directory in (environment, programs):
        directory.mkdir(parents=True)
    (environment / "python").symlink_to(sys.executable)
    program = environment / "some-program"
    program.touch(mode=0o755)
    (programs / "some-program").symlink_to(program)
    foreign = ForeignEnvironment("some-program", "It needs this", "some-package")
    monkeypatch.setenv("PATH", "/nowhere")
    assert not foreign.has("json")
    with pytest.raises(
        UserError, match=r"It needs this as the program some-program; .*some-package"
    ):
        foreign.find()
    monkeypatch.setenv("PATH", str(programs))
    assert foreign.has("json") and not foreign.has("no_such_module")
    assert foreign.script_command("it.py", "x")[0] == str(environment / "python")
