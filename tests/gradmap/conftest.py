"""Fixtures of the tests of checkpoints."""

import shutil

import pytest

from tests.conftest import make_pico


@pytest.fixture
def broken(picos, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(picos["llama"].directory, directory)
    return directory


@pytest.fixture(scope="session")
def llamas(tmp_path_factory):
    """By their number of layers."""
    root = tmp_path_factory.mktemp("llamas")
    return {
        layers: make_pico("llama", root / str(layers), num_hidden_layers=layers)
        for layers in (4, 8)
    }
