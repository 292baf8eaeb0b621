"""GitHub's and GitLab's runners, as far as our action and our template need one, and the API that comments go to.

Steps that others provide (`uses:`) and the installation are left out; `gradmap` is a stand-in unless PATH has another.
"""

import json
import re
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
