"""What users' type checkers need is in the wheel."""

import tomllib

from tests.conftest import ROOT


def test_each_package_of_the_wheel_says_that_it_is_typed():
    """Hatch takes whatever lies in them."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    packages = build["targets"]["wheel"]["packages"]
    assert packages and all((ROOT / name / "py.typed").is_file() for name in packages)
