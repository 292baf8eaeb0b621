"""Programs that never heard of us, in an environment of their own (`make consumers`), get the
reference's logits."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.reference import random_probe
from export.writers import Storage, write_checkpoint
from gradmap.common.errors import UserError
from gradmap.model.corrections import Place, Projection
from tests.conftest import FAMILIES, ROOT
from tests.export.conftest import put_on_path
from tests.export.sources import (
    CORRECTED,
    SHARD_BYTES,
    SHIFTED,
    export,
    make_source,
    unfolded_logits,
)
from tests.families import LAYERS

PYTHON = ROOT / ".venv-consumers" / "bin" / "python"
# Of float32 logits after LAYERS layers of two updates, two dot products of at most 40 terms each
TOLERANCE = 4 * LAYERS * 40 * 2**-24


def consume(consumer, out, input_ids, *artifacts):
    assert PYTHON.exists(), "run `make consumers`"
    save_file({"input_ids": input_ids.contiguous()}, out / "probe.safetensors")
    script = Path(__file__).with_name("consumer.py")
    command = [str(PYTHON), str(script), consumer, str(out), *map(str, artifacts)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return {
        artifact.name: load_file(out / f"{artifact.name}.safetensors") for artifact in artifacts
    }


def require_same(consumed, expected):
    difference = (consumed["logits"].double() - expected).abs().max() / expected.abs().max()
    assert difference < TOLERANCE


def test_transformers_4_reads_the_checkpoint_of_every_family(picos, tmp_path):
    sources = {family: make_source(picos[family], removed=SHIFTED) for family in FAMILIES}
    for family, source in sources.items():
        (tmp_path / family).mkdir()
        write_checkpoint(tmp_path / family, source, Storage("keep", None, SHARD_BYTES))
    probe = sources["llama"].probe_ids
    consumed = consume("transformers", tmp_path, probe, *(tmp_path / family for family in FAMILIES))
    for family, source in sources.items():
        require_same(consumed[family], unfolded_logits(picos[family], source, torch.float64))


@pytest.fixture(scope="module")
def exported(picos, tmp_path_factory):
    out = tmp_path_factory.mktemp("consumed")
    source = make_source(picos["llama"], removed=SHIFTED)
    export(source, out, "onnx")
    return source, out / "onnx"


def test_optimum_runs_the_onnx_artifact(picos, exported, tmp_path):
    source, directory = exported
    consumed = consume("optimum", tmp_path, source.probe_ids, directory)["onnx"]
    require_same(consumed, unfolded_logits(picos["llama"], source, torch.float64))
    expected = load_file(directory / "gradmap.probe")["greedy_ids"]
    assert torch.equal(consumed["generated"], expected[: len(consumed["generated"])])


def test_llama_cpps_converter_makes_one_file_of_the_pruned_model(
    picos, smollm2, tmp_path, monkeypatch
):
    plan = make_source(picos["llama"], removed=SHIFTED)
    noise = torch.randn(576, 576, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changes = {
        Place(CORRECTED, "mlp.down_proj"): (
            Projection(torch.eye(576, dtype=torch.float64) + 0.02 * noise),
        )
    }
    source = replace(
        plan, checkpoint=smollm2, changes=changes, probe_ids=random_probe(49152)[:, :20]
    )
    with pytest.raises(UserError, match="pipx install"):
        export(source, tmp_path, "gguf")
    put_on_path(monkeypatch, "consumers")
    record = export(source, tmp_path, "gguf")["gguf"]
    check = record.verification["transformers"]
    # the reference is rounded as the file is
    assert check.relative_difference <= check.tolerance < 1e-4
    assert record.layers == smollm2.config["num_hidden_layers"] - 2
    assert {"model.gguf", "tokenizer.json"} <= record.files.keys()
