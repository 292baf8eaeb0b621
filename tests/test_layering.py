"""Data flows one way: imports only go gradmap <- export <- serving <- loadtest."""

import ast
import importlib
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = ("gradmap", "export", "serving", "loadtest")


# Of ours, what the runners may import beside each other: names of files, and what a runtime reads.
KNOWN_TO_RUNNERS = {"export", "export.vllm_file", "gradmap.vllm_environment"}


def imported_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(path)}


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


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


def test_what_verifies_an_artifact_shares_no_arithmetic_with_what_made_it():
    files = sorted((ROOT / "export" / "runners").glob("*.py"))
    assert files
    for path in files:
        ours = {name for name in imported_modules(path) if name.partition(".")[0] in LAYERS}
        others = {name for name in ours if not name.startswith("export.runners.")}
        assert others <= KNOWN_TO_RUNNERS, path
