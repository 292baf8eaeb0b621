"""A checkpoint that was made of another file is used again only as it was made."""

import os
import shutil
from collections.abc import Callable

import pytest

from gradmap.common.made_once import STAMPS_FILE, made_once
from gradmap.model.checkpoint import open_checkpoint, read_config
from tests.pico_gguf import write_gguf


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


DAMAGES: dict[str, Callable] = {
    "a flipped byte": lambda made: flip(made / "model.safetensors"),
    "another config": lambda made: (made / "config.json").write_text("{}"),
    "no config": lambda made: (made / "config.json").unlink(),
    "no tokenizer": lambda made: (made / "tokenizer.json").unlink(),
    "no record": lambda made: (made / STAMPS_FILE).unlink(),
    "an empty record": lambda made: (made / STAMPS_FILE).write_text("{}"),
    "half a record": lambda made: os.truncate(made / STAMPS_FILE, 40),
    "nothing": shutil.rmtree,
}


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """Opens a GGUF file; returns its checkpoint's directory."""
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "pico.gguf")
    return lambda: open_checkpoint(str(tmp_path), "pico.gguf").directory


def contents(directory):
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.name != STAMPS_FILE
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_dequantised_checkpoint_that_was_changed_is_made_anew(gguf, capfd, damage):
    before = contents(gguf())
    capfd.readouterr()
    DAMAGES[damage](gguf())
    assert contents(gguf()) == before
    assert "Dequantising" in capfd.readouterr().err


def test_one_that_stayed_as_it_was_is_used_again(gguf, capfd):
    made = gguf()
    for path in made.iterdir():  # as in a copy, whose times are others
        os.utime(path, (0, 0))
    capfd.readouterr()
    inode = made.stat().st_ino
    assert gguf() == made
    assert made.stat().st_ino == inode
    assert "Dequantising" not in capfd.readouterr().err


def test_a_changed_config_is_not_read_either(gguf, tmp_path):
    expected = read_config(str(tmp_path), "pico.gguf")["num_hidden_layers"]
    made = gguf()
    config = (made / "config.json").read_text()
    (made / "config.json").write_text(
        config.replace(f'"num_hidden_layers": {expected}', '"num_hidden_layers": 99')
    )
    assert read_config(str(tmp_path), "pico.gguf")["num_hidden_layers"] == expected


def test_what_failed_leaves_nothing(tmp_path):
    def fail(directory):
        (directory / "config.json").write_text("{}")
        raise ValueError

    with pytest.raises(ValueError):
        made_once(tmp_path / "made", fail)
    assert not (tmp_path / "made").exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
