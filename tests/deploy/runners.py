"""GitHub's and GitLab's runners, as far as our action and our template need one, and the API that
comments go to.

Steps that others provide (`uses:`) and the installation are left out; `gradmap` is a stand-in
unless PATH has another.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.conftest import ROOT

ACTION = ROOT / ".github" / "actions" / "gradmap"
COMMENT_ACTION = ROOT / ".github" / "actions" / "comment"
WORKFLOW = ROOT / ".github" / "workflows" / "prune.yml"
GITLAB = ROOT / "deploy" / "gitlab" / "gradmap.gitlab-ci.yml"
TOKEN = "secret-token"
OWN_USER = "github-actions[bot]"  # that of the token
# Of `gradmap run`: what it leaves if it comes to a verdict, and how it ends
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
command, option, out, *rest, end, recipe = sys.argv[1:]
assert (command, option, end) == ("run", "--out", "--"), sys.argv
assert "GRADMAP_COMMENT_TOKEN" not in os.environ
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


def number_of(user):
    """As which a forge knows a user."""
    return sum(user.encode())


class Forge(ThreadingHTTPServer):
    """The comments of one pull or merge request, behind the API of GitHub or GitLab.

    authors: those of comments that the token's user did not write.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ForgeHandler)
        self.comments: dict[int, str] = {}
        self.authors: dict[int, str] = {}
        self.changes: list[str] = []
        self.refuses = False
        self.url = f"http://127.0.0.1:{self.server_port}"


class ForgeHandler(BaseHTTPRequestHandler):
    server: Forge

    def do_GET(self):
        if self.path == "/user":
            return self.answer({"id": number_of(OWN_USER)})
        query = parse_qs(urlsplit(self.path).query)
        size, page = int(query["per_page"][0]), int(query["page"][0])
        comments = [self.describe(number, body) for number, body in self.server.comments.items()]
        return self.answer(comments[size * (page - 1) : size * page])

    def describe(self, number, body):
        author = self.server.authors.get(number, OWN_USER)
        return {
            "id": number,
            "body": body,
            "user": {"login": author},
            "author": {"id": number_of(author)},
        }

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
        authorized = TOKEN in (
            self.headers["PRIVATE-TOKEN"],
            (self.headers["Authorization"] or "")[len("Bearer ") :],
        )
        self.send_response(200 if authorized else 401)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@dataclass
class Finished:
    """passed: whether the pipeline goes on. published: what others' steps were handed before the
    end, by name."""

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
        return subprocess.run(
            command,
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )


class GitHub:
    """Executes the composite action as the workflow does, and for a pull request the job that
    comments."""

    update = ("POST /repos/o/r/issues/7/comments", "PATCH /repos/o/r/issues/comments/1")

    def __init__(self, project):
        self.project = project
        self.temporary = project.directory.parent / "runner"
        self.temporary.mkdir()
        self.artifacts = project.directory.parent / "artifacts"
        self.artifacts.mkdir()

    def run(self, request=False, **inputs):
        """request: whether a pull request is what the job runs for."""
        inputs = {name.replace("_", "-"): value for name, value in inputs.items()}
        inputs = {"recipe": "my recipe.yaml", "out": "the result"} | inputs
        (self.temporary / "step_summary").write_text("")
        finished, outputs = self.run_action(ACTION, inputs, request)
        if request:
            finished.log += self.run_comment_job(inputs, outputs)
        return finished

    def run_action(self, directory, inputs, request):
        """The action's end and its outputs."""
        action = yaml.safe_load((directory / "action.yml").read_text())
        defaults = {name: one.get("default") for name, one in action["inputs"].items()}
        contexts = {
            "inputs": defaults | inputs,
            "github": {"token": TOKEN, "event": {"pull_request": {"number": 7}} if request else {}},
            "runner": {"temp": str(self.temporary)},
            "steps": {},
        }
        code, log, published = self.run_steps(directory, action["runs"]["steps"], contexts)
        outputs = {
            name: substitute(one["value"], contexts)
            for name, one in action.get("outputs", {}).items()
        }
        summary = (self.temporary / "step_summary").read_text()
        return Finished(
            code, code == 0, outputs.get("verdict", ""), summary, log, published
        ), outputs

    def run_comment_job(self, inputs, outputs):
        """Its log: what it ends with decides nothing."""
        job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["comment"]
        contexts = {
            "inputs": {"comment": True} | inputs,
            "github": {"event_name": "pull_request"},
            "needs": {"prune": {"outputs": outputs}},
        }
        assert evaluate(job["if"].removeprefix("${{").removesuffix("}}"), contexts)
        step = next(step for step in job["steps"] if step["uses"].endswith(COMMENT_ACTION.name))
        assert step["continue-on-error"]
        given = {name: substitute(value, contexts) for name, value in step["with"].items()}
        return self.run_action(COMMENT_ACTION, given, request=True)[0].log

    def run_steps(self, directory, steps, contexts):
        log = ""
        published: list[str] = []
        for step in steps:
            if step.get("name") == "Install" or not evaluate(step.get("if", "'true'"), contexts):
                continue
            if "uses" in step:
                given = {
                    name: substitute(str(value), contexts) for name, value in step["with"].items()
                }
                published += given.values()
                self.use(step["uses"], given)
                continue
            finished, outputs = self.run_step(directory, step, contexts)
            log += finished.stdout + finished.stderr
            contexts["steps"][step.get("id")] = {"outputs": outputs}
            if finished.returncode:
                return finished.returncode, log, published
        return 0, log, published

    def use(self, action, given):
        """Artifacts of one file, which jobs hand each other; other actions do nothing here."""
        if "upload-artifact" in action and Path(given["path"]).is_file():
            shutil.copy(given["path"], self.artifacts / given["name"])
        if "download-artifact" in action:
            Path(given["path"]).mkdir(exist_ok=True)
            shutil.copy(self.artifacts / given["name"], Path(given["path"]) / "gradmap.md")

    def run_step(self, directory, step, contexts):
        assert step["shell"] == "bash"  # a composite action has no default
        output = self.temporary / "output"
        output.write_text("")
        environment = {
            "GITHUB_ACTIONS": "true",
            "GITHUB_ACTION_PATH": str(directory),
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
    """The few operators of GitHub's expressions that we use are Python's, under other names.

    An output of a step that did not run is empty.
    """

    def look_up(found):
        value = contexts
        for key in found[0].split("."):
            value = value.get(key, {})
        return repr(value or "")

    values = re.sub(r"[a-z]+(?:\.[\w-]+)+", look_up, expression.strip())
    python = re.sub(r"!(?!=)", " not ", values).replace("&&", "and").replace("||", "or")
    return eval(python, {"cancelled": lambda: False})


class GitLab:
    """Executes the job of the template."""

    update = ("POST /projects/3/merge_requests/7/notes", "PUT /projects/3/merge_requests/7/notes/1")

    def __init__(self, project):
        self.project = project
        home = project.directory / ".gradmap"
        home.mkdir()
        (home / "source").symlink_to(ROOT)
        self.home = home

    def run(self, request=False, recipe="my recipe.yaml", out="the result", fail_on=None):
        """request: whether a merge request is what the job runs for."""
        job = yaml.safe_load(GITLAB.read_text())[".gradmap"]
        predefined = {"CI_PROJECT_DIR": str(self.project.directory), "CI_PROJECT_ID": "3"}
        predefined |= {"CI_API_V4_URL": self.project.forge.url}
        if request:
            predefined |= {"CI_MERGE_REQUEST_IID": "7", "GRADMAP_COMMENT_TOKEN": TOKEN}
        chosen = {"GRADMAP_RECIPE": recipe, "GRADMAP_OUT": out}
        chosen |= {"GRADMAP_FAIL_ON": fail_on} if fail_on is not None else {}
        variables = {
            name: Template(value).safe_substitute(predefined)
            for name, value in (job["variables"] | chosen).items()
        }
        finished = self.project.execute(
            "\n".join(job["script"]), self.project.environment | predefined | variables
        )
        code = finished.returncode
        passed = code == 0 or code in job["allow_failure"]["exit_codes"]
        outcome = dict(
            line.split("=", 1) for line in (self.home / "outcome").read_text().splitlines()
        )
        named = [
            *job["artifacts"]["paths"],
            *job["artifacts"]["reports"].values(),
            *job["cache"]["paths"],
        ]
        published = [Template(path).substitute(variables | predefined) for path in named]
        written = self.home / "summary.md"
        summary = written.read_text() if written.exists() else ""
        return Finished(
            code,
            passed,
            outcome.get("verdict", ""),
            summary,
            finished.stdout + finished.stderr,
            published,
        )
