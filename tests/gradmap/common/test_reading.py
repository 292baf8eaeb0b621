"""Files that others wrote: whatever is in them, they are read or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradmap.common.errors import UserError
from gradmap.common.reading import read_json, read_json_object, read_text
from gradmap.common.yaml_files import read_yaml

BROKEN_JSON = {
    b"": "not valid JSON",
    b'{"a": 1': "not valid JSON",
    b'{"a": NaN}': "NaN is no JSON number",
    b'{"a": [-Infinity]}': "-Infinity is no JSON number",
    b'{"a": 1e999}': "1e999 is beyond",
    b"[" * 100_000: "nested too deeply",
    '{"a": "é"}'.encode("latin-1"): "not text in UTF-8",
    '{"a": 1}'.encode("utf-16"): "is in UTF-16",
}
BROKEN_YAML = {
    b"a: 1\na: 2": "the key 'a' occurs twice",
    b"a: {b: 1, b: 2}": "the key 'b' occurs twice",
    b"[" * 5_000: "recursion",
    b"a: [": "not valid YAML",
    b"? [a]\n: 1": "unhashable",
    b"- 2026-13-45": "month",
    b"a: !!python/object/apply:os.system [x]": "could not determine a constructor",
    "a: é".encode("latin-1"): "not text in UTF-8",
}


@pytest.mark.parametrize(("contents", "problem"), BROKEN_JSON.items(), ids=range(len(BROKEN_JSON)))
def test_broken_json_is_refused_with_its_name(
    tmp_path: Path, contents: bytes, problem: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=rf"plan\.json.*{problem}"):
        read_json(path)


@pytest.mark.parametrize(("contents", "problem"), BROKEN_YAML.items(), ids=range(len(BROKEN_YAML)))
def test_broken_yaml_is_refused_with_its_name(
    tmp_path: Path, contents: bytes, problem: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=rf"recipe\.yaml.*{problem}"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["[1]", '"a"', "true", "null", "1"])
def test_json_of_another_shape_is_refused_where_an_object_is_expected(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json holds no JSON object"):
        read_json_object(tmp_path / "config.json")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_merge_key_of_yaml_repeats_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: &x {a: 1}\ny:\n  <<: *x\n  a: 3\n")
    assert read_yaml(tmp_path / "a.yaml")["y"] == {"a": 3}


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        read_text(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_text(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/b cannot be read: Not a directory"):
        read_text(tmp_path / "file" / "b")
