"""Data flows one way: imports only go gradmap <- export <- serving <- loadtest, and inside gradmap
from room to room."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = ("gradmap", "export", "serving", "loadtest")
# Leads to the main functions of all, each imported when it is asked for.
FRONT_DOOR = ROOT / "gradmap" / "__init__.py"
# Of gradmap, from the lowest on: a room imports of those before it.
ROOMS = (
    "common",
    "data",
    "model",
    "runtimes",
    "costs",
    "methods",
    "pruning",
    "healing",
    "evaluation",
    "compare",
)

# Of ours, what the runners may import beside each other: names of files, and what a runtime reads.
KNOWN_TO_RUNNERS = {"export", "export.vllm_file", "gradmap.runtimes.vllm_environment"}


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
        if path != FRONT_DOOR:
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


def room_of(module: str) -> str | None:
    package, _, inside = module.partition(".")
    room = inside.partition(".")[0]
    return room if package == "gradmap" and room in ROOMS else None


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_room_above_it(room):
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    files = sorted((ROOT / "gradmap" / room).rglob("*.py"))
    assert len(files) > 1
    for path in files:
        assert not {room_of(name) for name in imported_modules(path)} & above, path


def test_of_the_load_test_only_the_pipeline_knows_plans_evaluations_and_artifacts():
    files = sorted((ROOT / "loadtest").rglob("*.py"))
    others = [path for path in files if path.parent.name != "pipeline"]
    assert others and len(others) < len(files)
    for path in others:
        names = imported_modules(path)
        assert not {room_of(name) for name in names} & {"pruning", "evaluation"}, path
        assert "export" not in imported_packages(path), path


def test_every_room_is_known():
    rooms = {path.parent.name for path in (ROOT / "gradmap").glob("*/__init__.py")}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_modules_import_each_other(layer):
    """Directly or in a circle, wherever in the file."""
    files = [path for path in sorted((ROOT / layer).rglob("*.py")) if path.stem != "__init__"]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    graph = {name: imported_modules(path) & set(modules) for name, path in modules.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(modules)
