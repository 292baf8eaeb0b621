"""What the project's own workflows, hooks and forms name exists, and a release is held against its
tag."""

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

GITHUB = ROOT / ".github"
CHECKS, RELEASE = (GITHUB / "workflows" / name for name in ("checks.yml", "release.yml"))
WORKFLOWS = pytest.mark.parametrize("path", [CHECKS, RELEASE], ids=lambda path: path.name)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        yield from job["steps"]


def scripts(path) -> str:
    return "\n".join(step["run"] for step in steps(path) if "run" in step)


@WORKFLOWS
def test_what_a_workflow_runs_exists(path):
    text = scripts(path)
    targets = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= set(targets)
    files = re.findall(r"[\w./-]+\.(?:toml|txt|py|sh)\b", text)
    assert files and all((ROOT / name).is_file() for name in files)


def test_a_change_passes_what_ci_runs_locally():
    local = set(re.findall(r"^make .*", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert local <= {step.get("run") for step in steps(CHECKS)}


@WORKFLOWS
def test_a_workflow_pins_actions_and_pastes_no_expression_into_a_shell(path):
    used = re.findall(r"uses: (.*)", path.read_text())
    pinned = r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+"
    assert used and all(re.fullmatch(pinned, one) for one in used)
    assert "${{" not in scripts(path)


def test_only_what_publishes_may_write_and_it_runs_no_code_of_ours():
    for path in (CHECKS, RELEASE):
        workflow = yaml.safe_load(path.read_text())
        assert "secrets." not in path.read_text()
        for name, job in workflow["jobs"].items():
            permissions = job.get("permissions", workflow["permissions"])
            if "write" in permissions.values():
                assert (name, permissions) == ("publish", {"id-token": "write"})
                assert all(step.keys() <= {"uses", "with"} for step in job["steps"])
                assert not [step for step in job["steps"] if "checkout" in step["uses"]]


@pytest.mark.parametrize("tag", [f"v{PROJECT['version']}", "v99.0.0", PROJECT["version"]])
def test_a_tag_that_is_not_the_version_is_not_released(tag):
    (script,) = (step["run"] for step in steps(RELEASE) if step.get("name", "").startswith("Hold"))
    finished = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=ROOT,
        env=os.environ | {"GITHUB_REF_NAME": tag},
        capture_output=True,
        text=True,
        check=False,
    )
    fits = tag == f"v{PROJECT['version']}"
    assert (finished.returncode == 0) == fits
    assert fits or f"The tag is {tag}" in finished.stderr


def test_the_hooks_are_the_linters_of_make_lint():
    """With a flag more: pre-commit names files, of which ruff would check those that it
    excludes."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    recipe = re.search(r"^lint: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    linters = re.findall(r"\$\(VENV\)/bin/(ruff \w+|mypy)", recipe[1])
    assert [hook.removesuffix(" --force-exclude") for hook in hooks] == linters


def test_what_ci_installs_for_the_site_is_held_against_hashes():
    text = (ROOT / "constraints" / "site.txt").read_text()
    packages = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert any(package.startswith("mkdocs-material==") for package in packages)
    assert all("--hash=sha256:" in package for package in packages)


def test_the_citation_has_the_project_s_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}  # by the format's schema
    assert required <= citation.keys()
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    (paper,) = citation["references"]
    assert paper["title"].startswith("GradMAP: ")
    assert len(paper["authors"]) == 4
    assert {"type", "title", "authors"} <= paper.keys()


def test_issue_forms_are_what_github_takes_and_name_pages_that_exist():
    for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= form.keys()
        fields = [one for one in form["body"] if one["type"] != "markdown"]
        assert len({one["id"] for one in fields}) == len(fields) > 0
        assert all(one["attributes"]["label"] for one in fields)
        named = re.findall(r"[\w/.-]+\.md\b", path.read_text())
        assert all((ROOT / name).is_file() for name in named)
