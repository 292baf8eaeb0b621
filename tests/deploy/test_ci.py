"""What users' pipelines run: the shell of the GitHub action and of the GitLab job, executed as
their runners would."""

import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import yaml

from gradmap.common.verdict import EXIT_CODES, Verdict
from tests.conftest import ASSETS, BOOLQ, ROOT, SMALL_LOAD_TEST, SMOLLM2, SMOLLM2_GGUF, SQUAD
from tests.deploy.runners import (
    ACTION,
    COMMENT_ACTION,
    STAND_IN,
    TOKEN,
    WORKFLOW,
    Forge,
    GitHub,
    GitLab,
    Project,
)

FILES = (ACTION / "action.yml", COMMENT_ACTION / "action.yml", WORKFLOW)


@pytest.fixture
def project(tmp_path):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "gradmap").write_text(STAND_IN)
    (binaries / "gradmap").chmod(0o755)
    directory = tmp_path / "a project"  # paths with a space show what is not quoted
    directory.mkdir()
    (directory / "my recipe.yaml").write_text("model: m\n")
    forge = Forge()
    threading.Thread(target=forge.serve_forever, daemon=True).start()
    foreign = ("GITHUB_", "CI_", "RUNNER_")  # of a runner that these tests run on
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    yield Project(
        directory,
        forge,
        own | {"PATH": f"{binaries}:{os.environ['PATH']}", "no_proxy": "127.0.0.1"},
    )
    forge.shutdown()
    forge.server_close()


@pytest.fixture(params=[GitHub, GitLab])
def ci(request, project):
    return request.param(project)


@pytest.mark.parametrize("verdict", Verdict)
def test_fail_and_invalid_fail_the_job_and_everything_is_published_first(ci, verdict):
    ci.project.ends_with(verdict, EXIT_CODES[verdict])
    finished = ci.run()
    assert finished.passed == (verdict in (Verdict.PASS, Verdict.INCONCLUSIVE)), finished.log
    assert finished.exit_code in (EXIT_CODES[verdict], 0)
    assert finished.verdict == verdict
    assert f"speed: **{verdict}**" in finished.summary
    assert "a table of dense against pruned" in finished.log
    assert any("the result" in one for one in finished.published)


@pytest.mark.parametrize("code", [2, 70, 130])
def test_a_run_that_breaks_off_always_fails_the_job(ci, code):
    ci.project.ends_with("", code)
    finished = ci.run(fail_on="")
    assert (finished.exit_code, finished.passed, finished.verdict) == (code, False, "ERROR")
    assert f"broke off with exit code {code}" in finished.summary


def test_the_policy_says_which_verdicts_fail(ci):
    ci.project.ends_with("INCONCLUSIVE", 3)
    assert ci.run(fail_on="FAIL, INCONCLUSIVE").exit_code == 3
    assert ci.run(fail_on="FAIL\nINVALID").exit_code == 0
    ci.project.ends_with("FAIL", 1)
    assert ci.run(fail_on="INVALID").exit_code == 0


def test_a_misspelt_policy_is_not_one_that_lets_everything_pass(ci):
    ci.project.ends_with("FAIL", 1)
    finished = ci.run(fail_on="FIAL INVALID")
    assert not finished.passed
    assert "'FIAL' is no verdict that can fail" in finished.log


def test_reports_of_an_earlier_run_do_not_pass_as_those_of_one_that_breaks_off(ci):
    ci.project.ends_with("PASS", 0)
    assert ci.run().passed
    ci.project.ends_with("", 2)
    finished = ci.run()
    assert "PASS" not in finished.summary
    # Exit code 1 without a report: Python's own, not the verdict FAIL
    ci.project.ends_with("", 1)
    finished = ci.run(fail_on="INVALID")
    assert (finished.exit_code, finished.verdict) == (70, "ERROR")


def test_only_an_invalid_load_test_is_repeated(ci):
    for verdict in ("INCONCLUSIVE", "INVALID", "PASS"):
        ci.project.ends_with(verdict, EXIT_CODES[Verdict(verdict)])
        ci.run()
    ci.run()
    assert ci.project.calls == ["", "", "--from loadtest", ""]


def test_one_comment_is_kept_up_to_date_and_others_are_left_alone(ci):
    ci.project.ends_with("FAIL", 1)
    ci.run(request=True)
    others = {number: f"comment {number}, not ours" for number in range(2, 103)}
    ours = ci.project.forge.comments.pop(1)
    assert "speed: **FAIL**" in ours
    ci.project.forge.comments = {**others, 1: ours}  # on the second page
    ci.project.ends_with("PASS", 0)
    ci.run(request=True)
    assert ci.project.forge.changes == list(ci.update)
    assert "speed: **PASS**" in ci.project.forge.comments.pop(1)
    assert ci.project.forge.comments == others


def test_a_comment_of_somebody_else_that_looks_like_ours_stays_theirs(ci):
    ci.project.ends_with("FAIL", 1)
    ci.run(request=True)
    forge = ci.project.forge
    theirs = forge.comments.pop(1) + "and more"
    forge.comments, forge.authors, forge.changes = {1: theirs}, {1: "a-stranger"}, []
    ci.run(request=True)
    assert forge.comments[1] == theirs
    assert "speed: **FAIL**" in forge.comments[2]
    ci.project.ends_with("PASS", 0)
    ci.run(request=True)
    assert "speed: **PASS**" in forge.comments[2]
    assert len(forge.comments) == 2


FORGERY = "verdict=PASS\nexit_code=0\n"


@pytest.mark.parametrize("which", ["recipe", "out"])
def test_a_name_with_a_line_break_forges_no_output(ci, which):
    ci.project.ends_with("FAIL", 1)
    finished = ci.run(**{which: f"x\n{FORGERY}.yaml"})
    assert (finished.exit_code, finished.verdict) == (2, "")
    assert "no recipe or result directory may have a control character in its name" in finished.log
    assert not (ci.project.directory / "calls").exists()


def test_a_recipe_s_name_ends_neither_the_comment_s_first_line_nor_its_code(ci):
    recipe = "a --> `@everybody` b.yaml"
    (ci.project.directory / recipe).write_text("model: m\n")
    ci.project.ends_with("", 2)
    for _ in range(2):
        ci.run(request=True, recipe=recipe)
    first, second = ci.project.forge.comments[1].splitlines()
    assert first == "<!-- gradmap a --%3E %60%40everybody%60 b.yaml -->"
    assert second.startswith("gradmap: `a --> @everybody b.yaml` broke off with exit code 2")
    assert len(ci.project.forge.comments) == 1


def test_the_summary_has_no_say_in_which_comment_it_replaces(ci):
    """It is written where the model runs; other workflows comment as the same user."""
    of_another_workflow = "## gradmap: a model\n\nas the summary begins"
    ci.project.forge.comments = {1: of_another_workflow}
    (ci.project.directory / "other.yaml").write_text("model: m\n")
    ci.project.ends_with("PASS", 0)
    for recipe in ("my recipe.yaml", "other.yaml", "my recipe.yaml"):
        ci.run(request=True, recipe=recipe)
    first_lines = [comment.splitlines()[0] for comment in ci.project.forge.comments.values()]
    own = ["<!-- gradmap my recipe.yaml -->", "<!-- gradmap other.yaml -->"]
    assert first_lines == ["## gradmap: a model", *own]
    assert ci.project.forge.comments[1] == of_another_workflow


def test_artifacts_have_plain_names(project):
    recipe = "é $x:1.b.yaml"
    (project.directory / recipe).write_text("model: m\n")
    project.ends_with("PASS", 0)
    published = GitHub(project).run(recipe=recipe).published
    names = [one for one in published if one.startswith("gradmap-")]
    assert names == ["gradmap-____x_1.b-summary", "gradmap-____x_1.b", "gradmap-____x_1.b-vllm"]


@pytest.mark.parametrize("verdict", ["", "*", "SUPERB"])
def test_what_is_no_verdict_passes_no_gate(project, verdict):
    gate = ROOT / "deploy" / "ci" / "gate.sh"
    finished = project.execute(f"bash '{gate}' '{verdict}' 0 FAIL", project.environment)
    assert finished.returncode == 2
    assert f"'{verdict}' is no verdict" in finished.stderr


def test_a_push_gets_no_comment(ci):
    ci.project.ends_with("PASS", 0)
    assert ci.run().passed
    assert ci.project.forge.changes == []


@pytest.mark.parametrize("verdict", [Verdict.PASS, Verdict.FAIL])
def test_a_comment_that_is_refused_changes_nothing_and_shows_no_token(ci, verdict):
    ci.project.ends_with(verdict, EXIT_CODES[verdict])
    ci.project.forge.refuses = True
    finished = ci.run(request=True)
    assert finished.exit_code == EXIT_CODES[verdict]
    assert "The comment could not be written: HTTP Error 403" in finished.log
    assert TOKEN not in finished.log


def test_what_the_gitlab_job_reports_is_where_a_load_test_writes_it(project):
    project.ends_with("PASS", 0)
    published = GitLab(project).run().published
    assert (
        project.directory / next(path for path in published if path.endswith("junit.xml"))
    ).is_file()


def test_no_expression_is_pasted_into_a_shell():
    """An input such as `$(...)` would be executed."""
    assert not [step["run"] for step in all_steps() if "${{" in step.get("run", "")]


def all_steps():
    """Of the workflow and both actions."""
    for path in FILES:
        content = yaml.safe_load(path.read_text())
        for part in content["jobs"].values() if "jobs" in content else [content["runs"]]:
            yield from part["steps"]


def test_actions_of_others_are_pinned_by_commit():
    used = [
        found
        for path in FILES
        for found in re.findall(r"^ +(?:- )?uses: ([^.].*)", path.read_text(), re.MULTILINE)
    ]
    assert len(used) == len(
        [step for step in all_steps() if not step.get("uses", ".").startswith(".")]
    )
    assert not [
        one for one in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one)
    ]


def test_what_may_write_has_no_secret_and_runs_no_model():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    writing = {name for name, job in jobs.items() if "write" in job["permissions"].values()}
    running = {
        name
        for name, job in jobs.items()
        if "secrets." in str(job) or f"actions/{ACTION.name}'" in str(job)
    }
    assert (writing, running) == ({"comment"}, {"prune"})


def test_the_workflow_and_the_action_name_only_what_exists():
    """GitHub replaces a misspelt name by nothing."""
    workflow = yaml.safe_load(WORKFLOW.read_text())
    action, comment = (
        yaml.safe_load((path / "action.yml").read_text()) for path in (ACTION, COMMENT_ACTION)
    )
    # YAML 1.1 reads `on` as true
    call, job = (workflow[True]["workflow_call"], workflow["jobs"]["prune"])
    named = {text: set(re.findall(r"inputs\.([\w-]+)", text.read_text())) for text in FILES}
    assert list(named.values()) == [
        set(action["inputs"]),
        set(comment["inputs"]),
        set(call["inputs"]),
    ]
    uses = next(step for step in job["steps"] if step.get("id") == "gradmap")
    assert (ROOT / uses["uses"].removeprefix("./.gradmap/") / "action.yml").is_file()
    assert uses["with"].keys() <= action["inputs"].keys()
    (uses,) = (step for step in workflow["jobs"]["comment"]["steps"] if "comment" in step["uses"])
    assert (ROOT / uses["uses"].removeprefix("./.gradmap/") / "action.yml").is_file()
    assert uses["with"].keys() == comment["inputs"].keys()
    assert (
        set(re.findall(r"needs\.prune\.outputs\.([\w-]+)", WORKFLOW.read_text()))
        <= job["outputs"].keys()
    )
    assert (
        set(re.findall(r"steps\.gradmap\.outputs\.([\w-]+)", WORKFLOW.read_text()))
        <= action["outputs"].keys()
    )
    assert set(re.findall(r"secrets\.(\w+)", WORKFLOW.read_text())) == call["secrets"].keys()


RECIPE = f"""
model: {SMOLLM2}
gguf_file: {SMOLLM2_GGUF}
prune: {{remove: 8, one_shot: true, calibration: "{BOOLQ}", samples: 8, tokens: 64}}
export: {{formats: [vllm]}}
eval: {{perplexity: {{squad: "{SQUAD}"}}, limit: 20}}
quality: {{max_perplexity_ratio: LIMIT}}
{SMALL_LOAD_TEST.rstrip()}
  require_speedup: 0.1
"""


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_action_fails_a_model_that_lost_too_much_and_goes_on_from_what_it_did(project):
    assert ASSETS.exists(), "run `make assets`"
    project.environment["PATH"] = (
        f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the real gradmap
    )
    recipe, action = project.directory / "my recipe.yaml", GitHub(project)

    recipe.write_text(RECIPE.replace("LIMIT", "1.5"))  # never met without 8 layers
    finished = action.run()
    assert (finished.exit_code, finished.verdict) == (1, "FAIL"), finished.log
    assert "is beyond 1.50" in finished.summary

    recipe.write_text(RECIPE.replace("LIMIT", "1000"))  # never missed
    finished = action.run()
    # 2 pairs cannot pass
    assert (finished.exit_code, finished.verdict) == (0, "INCONCLUSIVE"), finished.log
    assert "quality: **PASS**" in finished.summary
    assert "prune: done before, inputs unchanged" in finished.log
    shutil.rmtree(project.directory / "the result")  # gigabytes
