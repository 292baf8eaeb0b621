"""deploy/kubernetes as `kubectl kustomize` renders it: valid for Kubernetes, and in step with the
code."""

import json
import re
from copy import deepcopy
from pathlib import PurePosixPath

import kubernetes_validate
import pytest
from starlette.routing import Route

from export import VLLM_CONFIG_FILE
from gradmap.common.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OUT_OF_MEMORY,
    EXIT_TERMINATED,
    EXIT_USAGE,
)
from gradmap.common.verdict import EXIT_CODES, Verdict
from loadtest.commands import run
from loadtest.pipeline.recipe import load_recipe
from serving.admin import PROBE_TIMEOUT_S, Admin
from serving.server import KILL_MARGIN_S
from serving.settings import ServerSettings, server_environment
from tests.deploy.manifests import (
    CUSTOM_KINDS,
    KUBERNETES,
    OVERLAYS,
    RENDERED,
    build_target,
    container,
    environment,
    every_endpoint,
    every_pod,
    is_writable,
    mount_of,
    one,
    parse,
    parse_endpoint,
    parse_vllm,
    pods,
    pods_of,
    render,
)

# What Kubernetes says


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", RENDERED)
def test_kubernetes_knows_every_field(name, version):
    for manifest in render(name):
        if manifest["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(manifest, version, strict=True)
        for pod in pods_of(manifest):
            kubernetes_validate.validate(
                {"apiVersion": "v1", "kind": "Pod", **pod}, version, strict=True
            )


def test_a_field_that_does_not_exist_is_found():
    deployment = deepcopy(one("overlays/cpu", "Deployment"))
    container(deployment["spec"]["template"])["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)


def test_a_leader_worker_set_has_what_its_controller_reads():
    group = one("overlays/multi-node", "LeaderWorkerSet")
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(group["spec"]) == {"replicas", "startupPolicy", "leaderWorkerTemplate"}
    assert group["spec"]["startupPolicy"] == "LeaderCreated", (
        "a leader is ready only with its workers"
    )
    template = group["spec"]["leaderWorkerTemplate"]
    assert set(template) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_an_inference_service_has_what_its_controller_reads():
    service = one("overlays/kserve", "InferenceService")
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "RawDeployment"
    assert set(service["spec"]) == {"predictor"}
    assert container(pods("overlays/kserve")[0])["name"] == "kserve-container"
    assert container(pods("overlays/kserve")[0])["ports"][0]["name"] == "api", (
        "KServe routes to the first port"
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_prometheus_scrapes_the_admin_port(name):
    monitor = one(f"overlays/{name}", "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    (scraped,) = monitor["spec"]["endpoints"]
    assert set(monitor["spec"]) == {"selector", "endpoints"}
    assert (scraped["port"], scraped["path"]) == ("admin", "/metrics")


# What the code says


@every_endpoint
def test_gradmap_serve_understands_its_arguments(pod):
    options, flags = parse_endpoint(pod)
    assert options["directory"] == "/model"
    assert is_writable(pod, "/model") is False
    assert options["host"] == options["admin_host"] == "0.0.0.0", (
        "neither Service nor kubelet reach loopback"
    )
    assert options["log"] == "-"
    assert not is_writable(pod, str(options["api_key_file"]))
    parse_vllm(flags, "/model")


def test_leader_and_worker_form_one_group(tmp_path):
    (tmp_path / VLLM_CONFIG_FILE).write_text("dtype: bfloat16\n")
    leader, worker = pods("overlays/multi-node")
    size = one("overlays/multi-node", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["size"]
    assert container(worker)["command"] == ["python3", "-m", "serving.vllm_server"]
    asked = parse_vllm(container(worker)["args"], tmp_path)
    assert asked.headless
    assert asked.dtype == "bfloat16"
    assert (asked.nnodes, asked.node_rank, asked.master_addr) == (2, 1, "gradmap-group-0")
    options, flags = parse_endpoint(leader)
    same = ("nnodes", "node_rank", "master_addr", "tensor_parallel_size", "pipeline_parallel_size")
    of_leader = parse_vllm(flags, tmp_path)
    assert not of_leader.headless
    assert all(getattr(of_leader, field) == getattr(asked, field) for field in same)
    assert asked.pipeline_parallel_size == size
    assert options["restarts"] == 0, "a vLLM that was started again could not rejoin its group"
    in_common = ("image", "resources", "securityContext", "volumeMounts")
    assert all(container(worker)[field] == container(leader)[field] for field in in_common)


def test_a_workers_environment_is_the_leaders(tmp_path, monkeypatch):
    for variable in ("CUDA_DEVICE_ORDER", "VLLM_NO_USAGE_STATS", "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.delenv(variable, raising=False)
    of_leader = server_environment(ServerSettings(tmp_path))
    own = {
        name: value
        for name, value in environment(pods("overlays/multi-node")[1]).items()
        if name != "HOME"
    }
    assert own.items() <= of_leader.items()


@every_endpoint
def test_ports_are_those_that_are_listened_on(pod):
    options, _ = parse_endpoint(pod)
    ports = {port["name"]: port["containerPort"] for port in container(pod)["ports"]}
    assert ports == {"api": options["port"], "admin": options["admin_port"]}


# KServe makes its own Service
@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "kserve"])
def test_the_service_leads_to_the_ports_of_endpoints_only(name):
    service = one(f"overlays/{name}", "Service")
    endpoint, *workers = pods(f"overlays/{name}")
    ports = {port["name"]: port["containerPort"] for port in container(endpoint)["ports"]}
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == ports
    assert all(port["targetPort"] == port["name"] for port in service["spec"]["ports"])
    assert service["spec"]["selector"].items() <= endpoint["metadata"]["labels"].items()
    assert not any(
        service["spec"]["selector"].items() <= worker["metadata"]["labels"].items()
        for worker in workers
    )


def test_no_service_has_the_name_of_the_one_that_the_group_makes():
    manifests = render("overlays/multi-node")
    assert one("overlays/multi-node", "LeaderWorkerSet")["metadata"]["name"] not in [
        manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "Service"
    ]


@pytest.mark.parametrize("name", OVERLAYS)
def test_policy_and_budget_are_for_the_endpoints(name):
    labels = pods(f"overlays/{name}")[0]["metadata"]["labels"]
    policies = {
        each["metadata"]["name"]: each["spec"]
        for each in render(f"overlays/{name}")
        if "Policy" in each["kind"]
    }
    policy, budget = policies["gradmap"], one(f"overlays/{name}", "PodDisruptionBudget")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    clients, monitoring = policy["ingress"]
    assert clients["ports"] == [{"port": "api"}]
    assert monitoring["ports"] == [{"port": "admin"}]
    assert all(source for rule in policy["ingress"] for source in rule["from"]), (
        "nobody is let in unnamed"
    )
    assert "egress" not in policy and "Egress" in policy["policyTypes"]


@every_endpoint
def test_probes_are_routes_of_the_admin_port(pod):
    routes = [route.path for route in Admin([]).app().routes if isinstance(route, Route)]
    kinds = {"startupProbe": "/startupz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    for kind, path in kinds.items():
        assert path in routes
        assert container(pod)[kind]["httpGet"] == {"path": path, "port": "admin"}
    assert "/metrics" in routes
    assert container(pod)["readinessProbe"]["timeoutSeconds"] > PROBE_TIMEOUT_S


@every_endpoint
def test_gradmap_serve_gives_up_before_kubernetes_does(pod):
    options, _ = parse_endpoint(pod)
    probe = container(pod)["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > options["ready_timeout_s"]


@every_endpoint
def test_requests_in_flight_may_end(pod):
    options, _ = parse_endpoint(pod)
    needed_s = options["balancer_wait_s"] + options["drain_s"] + KILL_MARGIN_S
    assert pod["spec"]["terminationGracePeriodSeconds"] >= needed_s


def test_a_worker_helps_while_its_leader_drains():
    leader, worker = pods("overlays/multi-node")
    options, _ = parse_endpoint(leader)
    program, seconds = container(worker)["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    assert int(seconds) >= options["balancer_wait_s"] + options["drain_s"]
    assert worker["spec"]["terminationGracePeriodSeconds"] >= int(seconds) + KILL_MARGIN_S


@every_endpoint
def test_vllm_is_given_as_many_gpus_as_it_asks_for(pod):
    _, flags = parse_endpoint(pod)
    gpus = int(container(pod)["resources"]["limits"].get("nvidia.com/gpu", 0))
    assert container(pod)["image"] == ("gradmap:cuda" if gpus else "gradmap:cpu")
    assert parse_vllm(flags, "/model").tensor_parallel_size == max(1, gpus)


@every_pod
def test_images_are_those_that_are_built(pod):
    user = re.search(r"^USER (\d+)$", build_target(container(pod)["image"]), re.M)
    assert pod["spec"]["securityContext"]["runAsUser"] == int(user[1])


@every_endpoint
def test_vllm_is_given_the_flags_that_its_image_needs(pod):
    command = re.search(r"^CMD (.*)$", build_target(container(pod)["image"]), re.M)
    _, *needed = json.loads(command[1])
    _, flags = parse_endpoint(pod)
    assert set(needed) - {"--"} <= set(flags)


# Security


@every_pod
def test_pods_meet_the_restricted_standard(pod):
    of_pod, of_container = pod["spec"]["securityContext"], container(pod)["securityContext"]
    assert of_pod["runAsNonRoot"] and of_pod["runAsUser"] > 0, (
        "an image's user by name is not enough for the kubelet"
    )
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert of_container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["enableServiceLinks"] is False


@every_pod
def test_what_is_written_to_lies_on_a_volume(pod):
    written = ("/tmp/x", "/dev/shm/x", environment(pod)["HOME"])
    assert all(is_writable(pod, path) for path in written)
    named = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container(pod)["volumeMounts"]} == set(named)
    assert named["shm"]["emptyDir"]["medium"] == "Memory"


def test_no_key_is_among_the_manifests():
    assert not any(manifest["kind"] == "Secret" for name in RENDERED for manifest in render(name))


# The job


def test_a_verdict_is_final_and_a_killed_pod_is_not():
    spec = one("run", "Job")["spec"]
    verdict, disruption = spec["podFailurePolicy"]["rules"]
    final = {code for outcome, code in EXIT_CODES.items() if outcome is not Verdict.PASS} | {
        EXIT_USAGE,
        EXIT_BUG,
    }
    assert not final & {EXIT_OUT_OF_MEMORY, EXIT_INTERRUPTED, EXIT_TERMINATED}
    assert verdict == {
        "action": "FailJob",
        "onExitCodes": {"operator": "In", "values": sorted(final)},
    }
    assert disruption["action"] == "Ignore"
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "or the policy is refused"
    assert spec["backoffLimit"] > 0


def test_the_job_reads_a_recipe_and_writes_where_endpoints_read():
    (pod,) = pods("run")
    command, *arguments = container(pod)["args"]
    options = parse(run, arguments)
    assert (container(pod)["command"], command) == (["gradmap"], "run")
    recipe = one("run", "ConfigMap")
    assert options["recipe"] == PurePosixPath(
        mount_of(pod, "/recipes")["mountPath"], *recipe["data"]
    )
    assert {"name": "recipe", "configMap": {"name": recipe["metadata"]["name"]}}.items() <= pod[
        "spec"
    ]["volumes"][0].items()
    results = mount_of(pod, str(options["out"]))
    assert PurePosixPath(results["mountPath"]) in options["out"].parents, (
        "a volume's root may hold lost+found"
    )
    assert is_writable(pod, environment(pod)["GRADMAP_CACHE"])
    endpoint = pods("overlays/cpu")[0]
    model = mount_of(endpoint, "/model")
    assert PurePosixPath(results["mountPath"], model["subPath"]) == options["out"] / "vllm"
    claims = {claim["metadata"]["name"] for claim in render("storage.yaml")}
    used = [
        volume
        for each in (pod, endpoint)
        for volume in each["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert {volume["persistentVolumeClaim"]["claimName"] for volume in used} == claims


def test_the_recipe_is_one(tmp_path):
    (text,) = one("run", "ConfigMap")["data"].values()
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.model.startswith("/models/")
    assert recipe.loadtest.vllm_flag == list(parse_endpoint(pods("overlays/cpu")[0])[1]), (
        "measured as it is served"
    )
