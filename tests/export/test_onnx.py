"""The ONNX graph of every family computes what transformers computes, plain and through its KV
cache."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from export.onnx_export import OPSET, export_onnx, quantise_weights
from export.tolerance import STRAY_SHARE
from gradmap.common.errors import UserError
from gradmap.evaluation.backends import ScoreRequest
from gradmap.evaluation.onnx_backend import OnnxBackend
from gradmap.evaluation.transformers_backend import score_reference
from gradmap.runtimes.onnx_session import OnnxCausalLM
from tests.conftest import FAMILIES, MIXTURES, make_pico
from tests.export.sources import SHIFTED, WITHOUT_US, export, make_source
from tests.families import LAYERS, VOCABULARY
from tests.gradmap.evaluation.test_scoring import random_requests

# torch.onnx's own
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SPLIT = 9
# Of a float32 logit after LAYERS layers of dot products over at most 40 terms, relative to the
# largest logit
FLOAT32_TOLERANCE = 4 * LAYERS * 40 * 2**-24
# A block of 32 normal weights reaches 2.1 standard deviations in 127 steps; errors are uniform in a
# step
INT8_ERROR = 2.1 / 127 / 12**0.5


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[family for family in FAMILIES if family not in MIXTURES])
def pico(request, picos):
    """torch's exporter cannot trace the routing of a mixture of experts."""
    return picos[request.param]


@pytest.fixture
def graph(pico, tmp_path):
    export_onnx(pico.directory, tmp_path)
    return tmp_path


def test_the_graph_is_right_for_every_family(pico, graph, input_ids):
    expected = pico.load(torch.float32)(input_ids=input_ids).logits.numpy()
    tolerance = FLOAT32_TOLERANCE * np.abs(expected).max()
    model = OnnxCausalLM(graph)
    np.testing.assert_allclose(
        model.step(input_ids.numpy(), None)[0], expected, rtol=0, atol=tolerance
    )
    _, cache = model.step(input_ids[:, :SPLIT].contiguous().numpy(), None)
    # one new token, then several
    for start, end in ((SPLIT, SPLIT + 1), (SPLIT + 1, input_ids.shape[1])):
        logits, cache = model.step(input_ids[:, start:end].contiguous().numpy(), cache)
        np.testing.assert_allclose(logits, expected[:, start:end], rtol=0, atol=tolerance)
    require_standard_layout(graph)

    quantise_weights(graph, 8)
    quantised = OnnxCausalLM(graph).step(input_ids.numpy(), None)[0]
    error = np.linalg.norm(quantised - expected) / np.linalg.norm(expected)
    # every linear map of a layer, in twos in a row, and the head; activations are rounded too,
    # which the 3 has room for
    assert 1e-4 < error < 3 * INT8_ERROR * (4 * LAYERS + 1) ** 0.5
    quantised_maps = [
        node for node in onnx.load(graph / "model.onnx").graph.node if node.op_type == "MatMulNBits"
    ]
    assert len(quantised_maps) >= 4 * LAYERS


def require_standard_layout(graph):
    model = onnx.load(graph / "model.onnx")
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", OPSET)}
    inputs = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    names = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    assert list(inputs) == [
        *("input_ids", "attention_mask", "position_ids"),
        *(f"past_key_values.{name}" for name in names),
    ]
    assert [value.name for value in model.graph.output] == [
        "logits",
        *(f"present.{name}" for name in names),
    ]
    assert [dim.dim_param for dim in inputs["input_ids"]] == ["batch_size", "sequence_length"]
    assert inputs["past_key_values.0.key"][2].dim_param == "past_sequence_length"


@pytest.fixture(scope="module")
def artifact(picos, tmp_path_factory):
    """A float32 artifact of the Llama pico, and its gradmap.json."""
    out = tmp_path_factory.mktemp("onnx")
    return out / "onnx", export(make_source(picos["llama"], removed=SHIFTED), out, "onnx")["onnx"]


def test_an_onnx_artifact_is_verified_and_labelled(artifact):
    directory, record = artifact
    check = record.verification["onnxruntime"]
    assert "CPUExecutionProvider" in check.runtime
    assert check.relative_difference <= check.tolerance
    assert check.greedy_identical == check.greedy_tokens == 44  # positions 20 to 64 of the model
    model = onnx.load(directory / "model.onnx")
    assert {prop.key: prop.value for prop in model.metadata_props}["gradmap.name"] == record.name
    files = {path.name for path in directory.iterdir()}
    assert {"config.json", "tokenizer.json", "model.onnx", "README.md", "gradmap.probe"} <= files
    assert not [name for name in files if name.endswith(".safetensors")]


def test_a_half_precision_artifact_keeps_its_cache_in_half_precision_too(picos, artifact, tmp_path):
    record = export(
        make_source(picos["llama"], removed=SHIFTED), tmp_path, "onnx", dtype="float16"
    )["onnx"]
    check = record.verification["onnxruntime"]
    assert artifact[1].verification["onnxruntime"].relative_difference < check.relative_difference
    assert check.typical_difference <= check.tolerance
    assert (check.stray_share, artifact[1].verification["onnxruntime"].stray_share) == (
        STRAY_SHARE,
        0,
    )
    inputs = {
        value.name: value.type.tensor_type
        for value in onnx.load(tmp_path / "onnx" / "model.onnx").graph.input
    }
    assert inputs["past_key_values.0.key"].elem_type == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize(("quantise", "least"), [("int8", 0.9), ("int4", 0.5)])
def test_a_quantised_artifact_is_judged_by_agreement(picos, tmp_path, quantise, least):
    asked = {"quantise": quantise, "min_agreement": least}
    record = export(make_source(picos["opt"]), tmp_path, "onnx", **asked)["onnx"]
    check = record.verification["onnxruntime"]
    assert check.tolerance is None
    assert check.min_agreement == least <= check.argmax_agreement
    assert check.relative_difference > 1e-4
    assert check.divergence > 0 and check.perplexity_ratio > 0
    nodes = onnx.load(tmp_path / "onnx" / "model.onnx").graph.node
    found = [
        {attribute.name: attribute.i for attribute in node.attribute}
        for node in nodes
        if node.op_type == "MatMulNBits"
    ]
    # the output layer too, though it shares the embedding's weights
    *layers, head = found
    assert (head["N"], head["bits"]) == (VOCABULARY, 8)
    assert {node["bits"] for node in layers} == {int(quantise[-1])}
    assert len(layers) >= 4 * (LAYERS - 2)


def test_a_plain_onnxruntime_session_runs_it_without_our_packages(artifact):
    script = WITHOUT_US + (
        "import numpy as np, onnxruntime as ort;session = "
        f"ort.InferenceSession({str(artifact[0] / 'model.onnx')!r});past = {{i.name: np.zeros((1, "
        "i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[3:]};tokens = "
        "{'input_ids': [[5, 6, 7]], 'attention_mask': [[1, 1, 1]], 'position_ids': [[0, 1, "
        "2]]};tokens = {name: np.array(value) for name, value in "
        "tokens.items()};print(session.run(['logits'], tokens | past)[0].shape)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/"
    )
    assert finished.stdout.strip() == f"(1, 3, {VOCABULARY})", finished.stderr


def test_onnxruntime_genai_runs_its_own_artifact(tmp_path):
    # its attention wants heads of a multiple of 16
    pico = make_pico("llama", tmp_path / "pico", hidden_size=64)
    record = export(make_source(pico, removed=SHIFTED), tmp_path, "onnx-genai")["onnx-genai"]
    assert (
        record.verification["genai"].relative_difference <= record.verification["genai"].tolerance
    )
    assert (
        json.loads((tmp_path / "onnx-genai" / "genai_config.json").read_text())["model"]["type"]
        == "llama"
    )


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        ("hf", {"quantise": "int8"}, "no quantisation"),
        ("onnx", {"dtype": "bfloat16"}, "cannot store dtype"),
        ("onnx", {"quantise": "int3"}, "no quantisation"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(picos, tmp_path, form, settings, message):
    with pytest.raises(UserError, match=message):
        export(make_source(picos["llama"]), tmp_path, form, **settings)


def test_evaluation_in_onnx_runtime_gives_the_scores_of_transformers(picos, tmp_path):
    pico = picos["llama"]
    export_onnx(pico.directory, tmp_path)
    model = pico.load(torch.float32)
    backend = OnnxBackend(tmp_path, model.config.to_dict(), end_tokens=[2])
    requests = random_requests(torch.Generator().manual_seed(5))
    for request, score in zip(requests, backend.score(requests), strict=True):
        expected = score_reference(model, request)
        # a log likelihood is a difference of logits for each token of the continuation
        tolerance = 2 * FLOAT32_TOLERANCE * 10 * len(request.continuation)
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=tolerance)
        assert score.greedy_tokens == expected.greedy_tokens
    prompt = [5, 6, 7]
    (answer,) = backend.generate([prompt], 6)
    assert len(answer) == 6
    assert score_reference(model, ScoreRequest(tuple(prompt), tuple(answer))).greedy_tokens == len(
        answer
    )
    assert backend.generate([prompt], 6, lambda tokens: len(tokens) == 2) == [answer[:2]]
