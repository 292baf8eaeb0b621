"""Fixtures of the tests of recipes."""

import pytest

from tests.loadtest.recipes import MINIMAL


@pytest.fixture
def recipe_file(tmp_path, picos, word_file):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL.format(model=picos["llama"].directory, text=word_file))
    return path
