"""An artifact where it arrives: whole and faithful, or refused, whatever was made of it on the
way."""

import json
import shutil

import jsonschema
import pytest
from safetensors.torch import load_file, save_file

from export.artifact import verify_directory
from export.integrity import SCHEMA_VERSION, read_record
from gradmap.common.errors import UserError
from gradmap.common.files import sha256_file
from tests.conftest import ROOT


def test_an_artifact_can_be_checked_where_it_arrives(artifact, tmp_path, fresh_processes):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    result = verify_directory(received)
    assert result.files == len(artifact[2].files)
    expected, actual = artifact[2].verification["transformers"], result.verification["transformers"]
    assert actual.argmax_agreement == expected.argmax_agreement
    assert actual.relative_difference <= actual.tolerance == expected.tolerance
    assert actual.stray_share == expected.stray_share == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / "tokenizer.json").unlink(), r"lacks tokenizer\.json"),
        (
            lambda directory: flip_byte(directory / "model.safetensors"),
            r"model\.safetensors is not what was exported",
        ),
        (
            lambda directory: flip_byte(directory / "tokenizer.json"),
            r"tokenizer\.json is not what was exported",
        ),
        (
            lambda directory: flip_byte(directory / "config.json"),
            r"config\.json is not what was exported",
        ),
        (
            lambda directory: (directory / "modeling_evil.py").touch(),
            r"modeling_evil\.py is not part of the artifact",
        ),
        (lambda directory: (directory / "gradmap.json").unlink(), r"gradmap\.json does not exist"),
    ],
)
def test_a_damaged_or_altered_artifact_is_refused(artifact, tmp_path, damage, message):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    damage(received)
    with pytest.raises(UserError, match=message):
        verify_directory(received)


def test_weights_that_compute_something_else_are_refused_even_if_their_hash_is_right(
    artifact, tmp_path
):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    weights = load_file(received / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, received / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((received / "gradmap.json").read_text())
    record["files"]["model.safetensors"] = sha256_file(received / "model.safetensors")
    (received / "gradmap.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="logits differ from the reference"):
        verify_directory(received)


def change_record(directory, change):
    record = json.loads((directory / "gradmap.json").read_text())
    change(record)
    (directory / "gradmap.json").write_text(json.dumps(record))


def hash_anew(directory):
    """As whoever changes an artifact would."""
    names = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
    files = {name: sha256_file(directory / name) for name in names if name != "gradmap.json"}
    change_record(directory, lambda record: record.update(files=files))


def test_a_record_cannot_allow_itself_a_difference(artifact, tmp_path):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    weights = load_file(received / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, received / "model.safetensors", metadata={"format": "pt"})
    hash_anew(received)
    allowed = {"tolerance": 10.0, "stray_share": 1.0}
    change_record(received, lambda record: record["verification"]["transformers"].update(allowed))
    with pytest.raises(UserError, match="logits differ from the reference"):
        verify_directory(received)
    change_record(received, lambda record: record.update(verification={}))
    with pytest.raises(UserError, match="logits differ from the reference"):
        verify_directory(received)


def test_a_record_that_asks_for_more_than_rounding_allows_gets_it(artifact, tmp_path):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    asked = artifact[2].verification["transformers"].tolerance / 2
    change_record(
        received, lambda record: record["verification"]["transformers"].update(tolerance=asked)
    )
    assert verify_directory(received).verification["transformers"].tolerance == asked


@pytest.mark.parametrize("folder", ["", "additional_chat_templates"])
def test_a_program_in_an_artifact_is_refused_even_if_its_hash_is_right(artifact, tmp_path, folder):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    (received / folder).mkdir(exist_ok=True)
    (received / folder / "modeling_evil.py").write_text("print('ran')")
    hash_anew(received)
    with pytest.raises(UserError, match=r"modeling_evil\.py is a program"):
        verify_directory(received)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_code_that_a_config_names_is_refused_even_if_its_hash_is_right(artifact, tmp_path, name):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    contents = json.loads((received / name).read_text())
    (received / name).write_text(
        json.dumps(contents | {"auto_map": {"AutoTokenizer": ["owner/name--evil.Evil", None]}})
    )
    hash_anew(received)
    with pytest.raises(UserError, match=rf"/{name} names code to run \(auto_map\)"):
        verify_directory(received)


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "a/../config.json", "./config.json", ""]
)
def test_a_record_names_files_inside_the_directory_only(artifact, tmp_path, name):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    change_record(received, lambda record: record["files"].update({name: "0" * 64}))
    with pytest.raises(UserError, match="no plain name of a file inside the directory"):
        verify_directory(received)


def test_an_artifact_is_not_the_expected_one_if_its_record_is_another(artifact, tmp_path):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    expected = sha256_file(received / "gradmap.json")
    change_record(received, lambda record: record.update(name="another"))
    with pytest.raises(UserError, match=r"gradmap\.json is not the one that is expected"):
        verify_directory(received, expected)


@pytest.mark.parametrize("spell", [str.lower, str.upper])
def test_the_expected_hash_may_be_in_capitals(artifact, spell):
    expected = spell(sha256_file(artifact[0] / "gradmap.json"))
    assert read_record(artifact[0], expected).name == artifact[2].name


@pytest.mark.parametrize(
    "version", [None, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, str(SCHEMA_VERSION)]
)
def test_a_record_of_another_version_is_not_read(artifact, tmp_path, version):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    change_record(received, lambda record: record.update(schema_version=version))
    with pytest.raises(UserError, match=r"gradmap\.json is of another version of gradmap"):
        read_record(received)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda record: record.update(typo=1), "typo"),
        (lambda record: record["base_model"].update(typo=1), r"base_model\.typo"),
        (lambda record: record["plan"].update(typo=1), r"plan\.typo"),
        (lambda record: record["plan"]["calibration"].update(typo=1), r"plan\.calibration\.typo"),
        (lambda record: record["plan"]["calibration"].pop("source"), r"plan\.calibration\.source"),
        (
            lambda record: record["verification"]["transformers"].update(typo=1),
            r"verification\.transformers\.typo",
        ),
        (lambda record: record.update(layers="5"), "layers"),
        (lambda record: record.update(parameters=True), "parameters"),
    ],
)
def test_a_record_with_another_key_or_kind_of_value_is_refused_by_its_name(
    artifact, tmp_path, change, place
):
    received = shutil.copytree(artifact[0], tmp_path / "received")
    change_record(received, change)
    with pytest.raises(
        UserError, match=rf"gradmap\.json: {place}: .*; export the artifact again\.$"
    ):
        read_record(received)


def test_a_record_follows_its_schema_and_is_read_as_it_was_written(artifact):
    contents = json.loads((artifact[0] / "gradmap.json").read_text())
    schema = json.loads((ROOT / "docs" / "schemas" / "gradmap.schema.json").read_text())
    jsonschema.validate(contents, schema)
    assert json.dumps(read_record(artifact[0]).model_dump(mode="json")) == json.dumps(contents)


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
