"""Data flows one way: imports only go gradmap <- export <- serving <- loadtest."""

import ast
import importlib
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = ("gradmap", "export", "serving", "loadtest")


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_no_layer_above_it(layer):
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        assert not imported_packages(path) & above, path


@pytest.mark.parametrize("layer", LAYERS)
def test_packages_are_imported_from_this_checkout(layer):
    assert Path(importlib.import_module(layer).__file__).parent == ROOT / layer
