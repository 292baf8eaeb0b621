"""What users' pipelines run: the shell of the GitHub action and of the GitLab job, executed as their runners would.

Steps that others provide (`uses:`) and the installation are left out; `gradmap` is a stand-in but for the slow test.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from gradmap.verdict import EXIT_CODES, Verdict
from tests.conftest import ASSETS, BOOLQ, ROOT, SMOLLM2, SMOLLM2_GGUF, SQUAD

ACTION = ROOT / ".github" / "actions" / "gradmap"
WORKFLOW = ROOT / ".github" / "workflows" / "prune.yml"
GITLAB = ROOT / "deploy" / "gitlab" / "gradmap.gitlab-ci.yml"
TOKEN = "secret-token"
# Of `gradmap run`: what it leaves if it comes to a verdict, and how it ends
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
command, recipe, option, out, *rest = sys.argv[1:]
assert (command, option) == ("run", "--out"), sys.argv
pathlib.Path("calls").open("a").write(" ".join(rest) + "\\n")
out = pathlib.Path(out)
(out / "loadtest").mkdir(parents=True, exist_ok=True)
(out / "recipe.yaml").write_text(pathlib.Path(recipe).read_text())
if verdict := os.environ["STAND_IN_VERDICT"]:
    (out / "loadtest" / "report.json").write_text(json.dumps({{"verdict": verdict}}, indent=2))
    (out / "loadtest" / "junit.xml").write_text("<testsuite/>")
    (out / "result.json").write_text(json.dumps({{"verdict": verdict}}))
    (out / "report.md").write_text(f"## gradmap: a model\\n\\n- speed: **{{verdict}}**: why.\\n")
print("a table of dense against pruned")
sys.exit(int(os.environ["STAND_IN_CODE"]))
"""


class Forge(ThreadingHTTPServer):
    """The comments of one pull or merge request, behind the API of GitHub or GitLab."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ForgeHandler)
        self.comments: dict[int, str] = {}
        self.changes: list[str] = []
        self.refuses = False
        self.url = f"http://127.0.0.1:{self.server_port}"


class ForgeHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        size, page = int(query["per_page"][0]), int(query["page"][0])
        comments = [{"id": number, "body": body} for number, body in self.server.comments.items()]
        self.answer(comments[size * (page - 1) : size * page])

    def do_POST(self):
        self.change(len(self.server.comments) + 1)

    def do_PATCH(self):
        self.change(int(self.path.rpartition("/")[2]))

    def do_PUT(self):
        self.do_PATCH()

    def change(self, number):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["body"]
        if self.server.refuses:
            return self.send_error(403)
        self.server.comments[number] = body
        self.server.changes.append(f"{self.command} {self.path}")
        return self.answer({"id": number})

    def answer(self, content):
        authorized = TOKEN in (self.headers["PRIVATE-TOKEN"], (self.headers["Authorization"] or "")[len("Bearer ") :])
        self.send_response(200 if authorized else 401)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@dataclass(frozen=True)
class Finished:
    """passed: whether the pipeline goes on. published: what others' steps were handed before the end, by name."""

    exit_code: int
    passed: bool
    verdict: str
    summary: str
    log: str
    published: list[str] = field(default_factory=list)


@dataclass
class Project:
    """A user's checkout, and the environment that its jobs run in."""

    directory: Path
    forge: Forge
    environment: dict[str, str]

    @property
    def calls(self):
        return (self.directory / "calls").read_text().splitlines()

    def ends_with(self, verdict, code):
        """What the stand-in does from now on."""
        self.environment |= {"STAND_IN_VERDICT": verdict, "STAND_IN_CODE": str(code)}

    def execute(self, script, environment):
        """As both runners do."""
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script]
        return subprocess.run(command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False)


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
    yield Project(directory, forge, own | {"PATH": f"{binaries}:{os.environ['PATH']}", "no_proxy": "127.0.0.1"})
    forge.shutdown()
    forge.server_close()


class GitHub:
    """Executes the composite action."""

    update = ("POST /repos/o/r/issues/7/comments", "PATCH /repos/o/r/issues/comments/1")

    def __init__(self, project):
        self.project = project
        self.temporary = project.directory.parent / "runner"
        self.temporary.mkdir()

    def run(self, request=False, **inputs):
        """request: whether a pull request is what the job runs for."""
        action = yaml.safe_load((ACTION / "action.yml").read_text())
        inputs = {name.replace("_", "-"): value for name, value in inputs.items()}
        defaults = {name: one.get("default") for name, one in action["inputs"].items()}
        contexts = {
            "inputs": defaults | {"recipe": "my recipe.yaml", "out": "the result", "comment": "true"} | inputs,
            "github": {
                "token": TOKEN,
                "event_name": "pull_request" if request else "push",
                "event": {"pull_request": {"number": 7}} if request else {},
            },
            "steps": {},
        }
        summary = self.temporary / "step_summary"
        summary.write_text("")
        code, log, published = self.run_steps(action["runs"]["steps"], contexts)
        outputs = {name: substitute(one["value"], contexts) for name, one in action["outputs"].items()}
        assert outputs["report"] == f"{contexts['inputs']['out']}/report.md"
        return Finished(code, code == 0, outputs["verdict"], summary.read_text(), log, published)

    def run_steps(self, steps, contexts):
        log, published = "", []
        for step in steps:
            if step.get("name") == "Install" or not evaluate(step.get("if", "'true'"), contexts):
                continue
            if "uses" in step:
                published += [substitute(str(value), contexts) for value in step["with"].values()]
                continue
            finished, outputs = self.run_step(step, contexts)
            log += finished.stdout + finished.stderr
            contexts["steps"][step.get("id")] = {"outputs": outputs}
            if finished.returncode and not step.get("continue-on-error"):
                return finished.returncode, log, published
        return 0, log, published

    def run_step(self, step, contexts):
        assert step["shell"] == "bash"  # a composite action has no default
        output = self.temporary / "output"
        output.write_text("")
        environment = {
            "GITHUB_ACTIONS": "true",
            "GITHUB_ACTION_PATH": str(ACTION),
            "GITHUB_API_URL": self.project.forge.url,
            "GITHUB_REPOSITORY": "o/r",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(self.temporary / "step_summary"),
            "RUNNER_TEMP": str(self.temporary),
        }
        own = {name: substitute(value, contexts) for name, value in step.get("env", {}).items()}
        finished = self.project.execute(step["run"], self.project.environment | environment | own)
        return finished, dict(line.split("=", 1) for line in output.read_text().splitlines())


def substitute(text, contexts):
    """A text with ${{ }} in it."""
    return re.sub(r"\$\{\{(.*?)\}\}", lambda found: str(evaluate(found[1], contexts)), text)


def evaluate(expression, contexts):
    """The few operators of GitHub's expressions that the action uses are Python's, under other names."""

    def look_up(found):
        value = contexts
        for key in found[0].split("."):
            value = value[key]
        return repr(value)

    values = re.sub(r"[a-z]+(?:\.[\w-]+)+", look_up, expression.strip())
    return eval(values.replace("&&", "and").replace("||", "or"))


class GitLab:
    """Executes the job of the template."""

    update = ("POST /projects/3/merge_requests/7/notes", "PUT /projects/3/merge_requests/7/notes/1")

    def __init__(self, project):
        self.project = project
        home = project.directory / ".gradmap"
        home.mkdir()
        (home / "source").symlink_to(ROOT)
        self.home = home

    def run(self, request=False, fail_on=None):
        """request: whether a merge request is what the job runs for."""
        job = yaml.safe_load(GITLAB.read_text())[".gradmap"]
        predefined = {"CI_PROJECT_DIR": str(self.project.directory), "CI_PROJECT_ID": "3"}
        predefined |= {"CI_API_V4_URL": self.project.forge.url}
        if request:
            predefined |= {"CI_MERGE_REQUEST_IID": "7", "GRADMAP_COMMENT_TOKEN": TOKEN}
        chosen = {"GRADMAP_RECIPE": "my recipe.yaml", "GRADMAP_OUT": "the result"}
        chosen |= {"GRADMAP_FAIL_ON": fail_on} if fail_on is not None else {}
        variables = {
            name: Template(value).safe_substitute(predefined) for name, value in (job["variables"] | chosen).items()
        }
        finished = self.project.execute("\n".join(job["script"]), self.project.environment | predefined | variables)
        code = finished.returncode
        passed = code == 0 or code in job["allow_failure"]["exit_codes"]
        outcome = dict(line.split("=", 1) for line in (self.home / "outcome").read_text().splitlines())
        named = [*job["artifacts"]["paths"], *job["artifacts"]["reports"].values(), *job["cache"]["paths"]]
        published = [Template(path).substitute(variables | predefined) for path in named]
        summary = (self.home / "summary.md").read_text()
        return Finished(code, passed, outcome["verdict"], summary, finished.stdout + finished.stderr, published)


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
    assert (project.directory / next(path for path in published if path.endswith("junit.xml"))).is_file()


def test_no_expression_is_pasted_into_a_shell():
    """An input such as `$(...)` would be executed."""
    action, workflow = (yaml.safe_load(path.read_text()) for path in (ACTION / "action.yml", WORKFLOW))
    steps = [*action["runs"]["steps"], *(step for job in workflow["jobs"].values() for step in job["steps"])]
    assert not [step["run"] for step in steps if "${{" in step.get("run", "")]


def test_the_workflow_and_the_action_name_only_what_exists():
    """GitHub replaces a misspelt name by nothing."""
    action, workflow = (yaml.safe_load(path.read_text()) for path in (ACTION / "action.yml", WORKFLOW))
    call, job = workflow[True]["workflow_call"], workflow["jobs"]["prune"]  # YAML 1.1 reads `on` as true
    named = {text: set(re.findall(r"inputs\.([\w-]+)", text.read_text())) for text in (ACTION / "action.yml", WORKFLOW)}
    assert named == {ACTION / "action.yml": set(action["inputs"]), WORKFLOW: set(call["inputs"])}
    uses = next(step for step in job["steps"] if step.get("id") == "gradmap")
    assert (ROOT / uses["uses"].removeprefix("./.gradmap/") / "action.yml").is_file()
    assert uses["with"].keys() <= action["inputs"].keys()
    assert set(re.findall(r"steps\.gradmap\.outputs\.([\w-]+)", WORKFLOW.read_text())) <= action["outputs"].keys()
    assert set(re.findall(r"secrets\.(\w+)", WORKFLOW.read_text())) == call["secrets"].keys()


RECIPE = f"""
model: {SMOLLM2}
gguf_file: {SMOLLM2_GGUF}
prune: {{remove: 8, one_shot: true, calibration: "{BOOLQ}", samples: 8, tokens: 64}}
export: {{formats: [vllm]}}
eval: {{perplexity: {{squad: "{SQUAD}"}}, limit: 8}}
quality: {{max_perplexity_ratio: LIMIT}}
loadtest:
  quick: true
  require_speedup: 0.1
  pairs: 2
  concurrency: [1]
  requests: 4
  prompt_tokens: 64
  output_tokens: 24
  vllm_flag: [--enforce-eager, --max-model-len=512]
"""


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_action_fails_a_model_that_lost_too_much_and_goes_on_from_what_it_did(project):
    assert ASSETS.exists(), "run `make assets`"
    project.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the real gradmap
    recipe, action = project.directory / "my recipe.yaml", GitHub(project)

    recipe.write_text(RECIPE.replace("LIMIT", "1.5"))  # never met without 8 layers
    finished = action.run()
    assert (finished.exit_code, finished.verdict) == (1, "FAIL"), finished.log
    assert "is beyond 1.50" in finished.summary

    recipe.write_text(RECIPE.replace("LIMIT", "1000"))  # never missed
    finished = action.run()
    assert (finished.exit_code, finished.verdict) == (0, "INCONCLUSIVE"), finished.log  # 2 pairs cannot pass
    assert "quality: **PASS**" in finished.summary
    assert "prune: done before, inputs unchanged" in finished.log
    shutil.rmtree(project.directory / "the result")  # gigabytes
