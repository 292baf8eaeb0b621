"""What is exported of a GGUF file has the file's tokenizer and license."""

import json
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from export.artifact import export_artifacts, open_source
from export.options import ExportOptions
from gradmap.common.errors import UserError
from gradmap.model.checkpoint import open_checkpoint
from tests.pico_gguf import BOS, EOS, TEMPLATE, write_gguf


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    settings: dict[str, Any] = {
        "add_bos_token": True,
        "chat_template": TEMPLATE,
        "license": "gemma",
    }
    write_gguf(tmp_path / "pico.gguf", "gpt2", pre="smollm", **settings)
    return open_source(open_checkpoint(str(tmp_path), "pico.gguf"), None)


def export(source, out):
    return export_artifacts(source, ExportOptions(formats=["hf"], check_vllm=False), out)["hf"]


def test_the_artifact_has_the_files_tokenizer_and_license(source, tmp_path):
    record = export(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "hf")
    assert tokenizer("12")["input_ids"] == [BOS, *tokenizer.convert_tokens_to_ids(["1", "2"])]
    assert tokenizer.chat_template == TEMPLATE
    assert ModelCard.load(tmp_path / "out" / "hf" / "README.md").data.license == "gemma"
    assert record.base_model.license == "gemma"


EOT, EOM = 5, 9


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({}, EOS),
        ({"eot_token_id": EOS}, EOS),
        ({"eot_token_id": EOT, "eom_token_id": EOM}, [EOS, EOT, EOM]),
    ],
)
def test_a_generation_ends_where_the_file_says(tmp_path, monkeypatch, settings, ends):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "pico.gguf", "gpt2", **settings)
    export(open_source(open_checkpoint(str(tmp_path), "pico.gguf"), None), tmp_path / "out")
    # as transformers and vLLM do
    config = GenerationConfig.from_pretrained(tmp_path / "out" / "hf")
    assert (config.bos_token_id, config.eos_token_id) == (BOS, ends)
    assert AutoConfig.from_pretrained(tmp_path / "out" / "hf").eos_token_id == ends


def test_an_artifact_whose_tokenizer_lost_its_bos_is_refused(source, tmp_path):
    path = source.checkpoint.directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(UserError, match=r"The tokenizer is not that of .*pico\.gguf"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out" / "hf").exists()
