"""Which files of a model's directory are read: its own, and no other of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gradmap.common.errors import UserError
from gradmap.model.model_files import own_file, own_files, plain_name


@pytest.mark.parametrize("name", ["model.safetensors", "sub/model.safetensors", "a..b", "-x"])
def test_a_plain_name_stays_what_it_is(name: str) -> None:
    assert plain_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../b", "/etc/passwd", "a//b", "./a", "a/", "a\nb"]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no plain name"):
        own_file(tmp_path, name)


def test_a_link_inside_the_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a")
    (tmp_path / "tokenizer.txt").symlink_to("vocab.txt")
    assert own_file(tmp_path, "tokenizer.txt").read_text() == "a"


def test_a_snapshot_of_the_hubs_cache_is_links_to_its_blobs(tmp_path: Path) -> None:
    blobs, snapshot = (
        tmp_path / "models--a--b" / "blobs",
        tmp_path / "models--a--b" / "snapshots" / "0123",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert own_files(snapshot, ["*.json"]) == [snapshot / "config.json"]
    (snapshot / "other.json").symlink_to(tmp_path / "models--a--b" / "refs")
    with pytest.raises(UserError, match="leads nowhere"):
        own_files(snapshot, ["*.json"])


@pytest.mark.parametrize(
    ("directory", "target"),
    [
        ("models--a--b/snapshots/0123", "../../refs/main"),
        ("models--a--b/copies/0123", "../../blobs/abc"),
    ],
)
def test_only_a_snapshot_has_links_out_and_only_to_its_blobs(
    tmp_path: Path, directory: str, target: str
) -> None:
    model = tmp_path / directory
    model.mkdir(parents=True)
    (model / target).resolve().parent.mkdir()
    (model / target).resolve().write_text("{}")
    (model / "config.json").symlink_to(target)
    with pytest.raises(UserError, match=r"config\.json is a link out of the directory"):
        own_files(model, ["*.json"])


@pytest.mark.parametrize(
    "target", ["../id_rsa", "/proc/self/environ", "../private/key", "loop.txt", "/dev/zero"]
)
def test_a_link_to_anything_else_is_refused(tmp_path: Path, target: str) -> None:
    model = tmp_path / "model"
    (tmp_path / "private").mkdir()
    model.mkdir()
    for secret in (tmp_path / "id_rsa", tmp_path / "private" / "key"):
        secret.write_text("secret")
    (model / "loop.txt").symlink_to(target)
    with pytest.raises(UserError, match=r"loop\.txt is a link"):
        own_files(model, ["*.txt"])


def test_files_below_a_linked_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.jinja").write_text("secret")
    model = tmp_path / "model"
    model.mkdir()
    (model / "additional_chat_templates").symlink_to("../private")
    with pytest.raises(UserError, match="is a link out of the directory"):
        own_files(model, ["additional_chat_templates/*.jinja"])


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json is no regular file"):
        own_file(tmp_path, "config.json")
