"""Fixtures of the tests of checkpoints."""

import shutil

import pytest


@pytest.fixture
def broken(picos, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(picos["llama"].directory, directory)
    return directory
