"""A format is what its entry in FORMATS says: nothing else has to know it."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from export.artifact import verify_directory
from export.choices import choose_storage, runners_of
from export.costs import ExportSize, export_bytes, export_seconds
from export.format_help import dtype_help, format_help, quantise_help
from export.formats import FORMATS
from export.formats.format import Runner
from export.formats.hf import HF
from export.options import ExportOptions
from gradmap.common.errors import UserError
from serving.identity import Trust, identify
from tests.conftest import ROOT
from tests.export.sources import export, make_source
from tests.loadtest.test_estimates import DISK, EPYC, SMOLLM2


@pytest.fixture
def mine(monkeypatch):
    form = replace(
        HF, name="mine", use="Open it with mine.", library="of-mine", dtypes=("bfloat16",)
    )
    monkeypatch.setitem(FORMATS, "mine", form)
    return form


def test_a_new_entry_is_exported_verified_described_and_served(picos, tmp_path, mine):
    record = export(make_source(picos["llama"]), tmp_path, "mine")["mine"]
    assert (record.format, record.dtype) == ("mine", "bfloat16")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == "of-mine" and "Open it with mine." in card.text
    assert verify_directory(tmp_path / "mine").name == record.name
    assert identify(tmp_path / "mine", Trust()).name == record.name


def test_what_vllm_does_not_read_is_not_served(picos, tmp_path, mine, monkeypatch):
    export(make_source(picos["llama"]), tmp_path, "mine")
    monkeypatch.setitem(FORMATS, "mine", replace(mine, served=False))
    with pytest.raises(UserError, match=r"exported as mine, which vLLM does not read.*vllm\."):
        identify(tmp_path / "mine", Trust())


def test_a_new_entry_is_in_the_help(monkeypatch, mine):
    monkeypatch.setitem(FORMATS, "mine", replace(mine, quantisations=("int8",)))
    assert format_help().startswith("hf, vllm, onnx, onnx-genai, gguf or mine;")
    assert "bfloat16 for vllm and mine" in dtype_help()
    assert "8-bit integers (vllm, onnx, onnx-genai, gguf, mine)" in quantise_help()


def test_what_a_conversion_takes_is_estimated(monkeypatch, mine):
    def estimate(**changes):
        monkeypatch.setitem(FORMATS, "mine", replace(mine, **changes))
        size = ExportSize(["mine"])
        seconds = export_seconds(SMOLLM2, EPYC, size, 22, DISK)
        return seconds, export_bytes(SMOLLM2, EPYC, size, 22)

    (plain_s, plain_bytes), (converted_s, _) = estimate(), estimate(conversion_s_per_layer=1.0)
    assert converted_s > plain_s + 22
    assert estimate(memory_factor=9)[1] > plain_bytes
    assert estimate(runners=(Runner("slow", least_s=1e6),))[0] > 1e6


def test_a_package_that_is_missing_is_named_before_the_work(picos, mine, monkeypatch):
    absent = Runner("absent", package="no_such_package")
    monkeypatch.setitem(FORMATS, "mine", replace(mine, runners=(absent,)))
    config = picos["llama"].checkpoint.config
    with pytest.raises(UserError, match="Format mine needs the package no_such_package"):
        choose_storage("mine", ExportOptions(formats=["mine"]), config)
    optional = replace(mine, runners=(*mine.runners, replace(absent, optional=True)))
    assert runners_of(optional, check_vllm=True) == list(mine.runners)


@pytest.mark.parametrize("check", [True, False])
def test_an_optional_runner_is_left_out_if_the_user_says_so(mine, check):
    present = Runner("present", package="json", optional=True)
    form = replace(mine, runners=(*mine.runners, present))
    assert (present in runners_of(form, check)) == check


def test_a_rope_that_a_format_cannot_express_names_those_that_can(picos):
    config = picos["llama"].checkpoint.config | {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 300.0}
    }
    with pytest.raises(UserError, match=r"type dynamic, .*; use format hf or vllm\."):
        choose_storage("onnx", ExportOptions(formats=["onnx"]), config)


@pytest.mark.parametrize("page", ["docs/exporting.md", "docs/file-formats.md"])
def test_every_format_is_in_the_tables_of_the_documentation(page):
    rows = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| `")]
    named = {name.strip("` ") for row in rows for name in row.split("|")[1].split(",")}
    assert named >= set(FORMATS)
