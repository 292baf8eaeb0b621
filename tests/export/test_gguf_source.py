"""What is exported of a GGUF file has the file's tokenizer and license."""

import json

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from export.artifact import ExportSettings, export_artifacts, open_source
from gradmap.checkpoint import open_checkpoint
from gradmap.errors import UserError
from tests.pico_gguf import BOS, TEMPLATE, write_gguf


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    settings = {"add_bos_token": True, "chat_template": TEMPLATE, "license": "gemma"}
    write_gguf(tmp_path / "pico.gguf", "gpt2", pre="smollm", **settings)
    return open_source(open_checkpoint(str(tmp_path), "pico.gguf"), None)


def export(source, out):
    return export_artifacts(source, ExportSettings(["hf"], check_vllm=False), out)["hf"]


def test_the_artifact_has_the_files_tokenizer_and_license(source, tmp_path):
    record = export(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "hf")
    assert tokenizer("12")["input_ids"] == [BOS, *tokenizer.convert_tokens_to_ids(["1", "2"])]
    assert tokenizer.chat_template == TEMPLATE
    assert ModelCard.load(tmp_path / "out" / "hf" / "README.md").data.license == "gemma"
    assert record["base_model"]["license"] == "gemma"


def test_an_artifact_whose_tokenizer_lost_its_bos_is_refused(source, tmp_path):
    path = source.checkpoint.directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(UserError, match=r"The tokenizer is not that of .*pico\.gguf"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out" / "hf").exists()
