"""From a request to serve to an exit code: checks, one supervisor per model, the admin port, and
signals."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Thread

from gradmap.common.errors import EXIT_INTERRUPTED, UserError
from gradmap.common.machine import available_bytes
from gradmap.runtimes.openai_api import KEY_VARIABLE
from gradmap.runtimes.vllm_environment import KV_CACHE_VARIABLE, vllm_defaults
from serving.admin import Admin
from serving.admin_port import serving_admin
from serving.chat import has_chat_template
from serving.flags import flag_value
from serving.guard import guard_environment
from serving.identity import Identity, Trust, identify
from serving.log import Log
from serving.machine import (
    GPU_SHARE_FLAG,
    GPU_UTILISATION,
    bytes_in_memory,
    dtype_flags,
    require_gpu_memory,
    require_gpus,
    require_memory,
)
from serving.ports import require_free_port, require_ports, url_host
from serving.server import check_servable
from serving.settings import ServerSettings
from serving.signals import Stop
from serving.supervisor import Policy, State, Supervisor

POLL_S = 0.2
EXIT_FAILED = 1


@dataclass(frozen=True)
class Launch:
    """One or two models to serve, with what has to be known of each. settings: of the first; the
    second has the next port."""

    models: Sequence[Path]
    settings: ServerSettings
    policy: Policy
    admin_host: str
    admin_port: int
    trusts: Sequence[Trust]


def run(launch: Launch, log: Log) -> int:
    """Serves until a signal arrives or a server has failed; returns the exit code.

    Raises UserError if the model, the machine or a port does not allow a start, or if the first
    start failed.
    """
    _require_places(launch)
    log.open()
    identities = [
        identify(model, trust) for model, trust in zip(launch.models, launch.trusts, strict=True)
    ]
    settled = _settle(launch, identities)
    supervisors = [
        Supervisor(settings, identity, launch.policy, log)
        for settings, identity in zip(settled, identities, strict=True)
    ]
    stop = Stop()
    with stop.on_signals(supervisors):
        with serving_admin(Admin(supervisors).app(), launch.admin_host, launch.admin_port):
            _announce(launch, supervisors, log)
            _run_all(supervisors, stop.event)
        return _exit_code(supervisors, stop, log)


def _require_places(launch: Launch) -> None:
    """Raises UserError unless every port exists, is no other one's, and is free."""
    first = launch.settings.port
    ports = {
        f"--port{f' + {number}' if number else ''}": first + number
        for number in range(len(launch.models))
    }
    require_ports(ports | {"--admin-port": launch.admin_port})
    for option, port in ports.items():
        require_free_port(launch.settings.host, port, option)
    require_free_port(launch.admin_host, launch.admin_port, "--admin-port")


def _settle(launch: Launch, identities: Sequence[Identity]) -> list[ServerSettings]:
    """The settings of each model's server, after every check that takes no start."""
    gpus = require_gpus(launch.settings)
    settled = []
    for number, (model, identity) in enumerate(zip(launch.models, identities, strict=True)):
        flags = launch.settings.vllm_flags
        flags = (
            *memory_share(len(launch.models), bool(gpus), flags),
            *dtype_flags(gpus, flags),
            *flags,
        )
        settings = replace(
            launch.settings, directory=model, port=launch.settings.port + number, vllm_flags=flags
        )
        environment = guard_environment(settings, asdict(identity)) | cache_share(
            len(launch.models)
        )
        settings = replace(settings, environment=environment)
        check_servable(settings)
        settled.append(settings)
    if gpus:
        for settings, identity in zip(settled, identities, strict=True):
            require_gpu_memory(settings, identity, gpus)
    else:
        in_memory = map(bytes_in_memory, settled, identities)
        together = replace(identities[-1], weight_bytes=sum(in_memory))
        require_memory(settled[-1], together, available_bytes())
    return settled


def memory_share(models: int, on_gpu: bool, vllm_flags: Sequence[str]) -> tuple[str, ...]:
    """vLLM's flags that give each of several models its share of a GPU, unless the user gave a
    share."""
    if models == 1 or not on_gpu or flag_value(vllm_flags, GPU_SHARE_FLAG) is not None:
        return ()
    return (GPU_SHARE_FLAG, f"{GPU_UTILISATION / models:.2f}")


def cache_share(models: int) -> dict[str, str]:
    """The environment variables that give each of several models its share of the KV cache in a
    CPU's memory."""
    whole = os.environ.get(KV_CACHE_VARIABLE) or vllm_defaults().get(KV_CACHE_VARIABLE)
    return {} if whole is None or models == 1 else {KV_CACHE_VARIABLE: f"{float(whole) / models:g}"}


def _announce(launch: Launch, supervisors: Sequence[Supervisor], log: Log) -> None:
    settings = launch.settings
    for supervisor in supervisors:
        identity = supervisor.identity
        size = f"{identity.weight_bytes / 1e6:,.0f} MB of weights"
        url = supervisor.settings.url
        log.say(f"Starting vLLM for {identity.name} ({size}) at {url} ({log.location})")
    if len(supervisors) > 1:
        log.say(
            f"{len(supervisors)} models share this machine: each gets 1/{len(supervisors)} of the "
            "memory that vLLM takes, and they compete for its processors. To compare speeds, use "
            "gradmap loadtest"
        )
    _warn(supervisors, log)
    log.say(f"Try, once it is ready: {curl_command(settings, supervisors[0].identity.name)}")
    admin = f"http://{url_host(launch.admin_host)}:{launch.admin_port}"
    log.say(f"Probes and metrics: {admin}/readyz, /livez, /startupz, /info, /metrics")


def _warn(supervisors: Sequence[Supervisor], log: Log) -> None:
    host = supervisors[0].settings.host
    if supervisors[0].settings.is_public and not os.environ.get(KEY_VARIABLE):
        log.say(
            f"{host} is reachable from outside and no key is asked for; use --api-key-file",
            "WARNING",
        )
    for supervisor in supervisors:
        if not has_chat_template(supervisor.settings.directory, supervisor.settings.vllm_flags):
            log.say(
                f"{supervisor.identity.name} has no chat template, so /v1/chat/completions will "
                "refuse requests; give one with -- --chat-template FILE, or use /v1/completions",
                "WARNING",
            )


def curl_command(settings: ServerSettings, model: str) -> str:
    """Returns what to paste into a shell to get a completion; the key stays a variable's name."""
    words = ["curl", "--noproxy", "*"]
    if settings.certificate:
        words += ["--cacert", str(settings.certificate)]
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 16})
    words += [f"{settings.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    # in double quotes, so that the shell fills it in
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if os.environ.get(KEY_VARIABLE) else ""
    return shlex.join(words) + key


def _run_all(supervisors: Sequence[Supervisor], stopping: Event) -> None:
    """Starts one after the other: while vLLM measures how much of a GPU's memory it needs, what
    another one takes would count as its own. Returns when all have ended; if one fails for good,
    the others are stopped."""
    threads = [Thread(target=supervisor.run, args=(stopping,)) for supervisor in supervisors]
    try:
        for supervisor, thread in zip(supervisors, threads, strict=True):
            _stop_if_one_failed(supervisors, stopping)
            # ends at once if the end has been asked for
            thread.start()
            while thread.is_alive() and not (supervisor.status.was_ready or stopping.is_set()):
                stopping.wait(POLL_S)
                _stop_if_one_failed(supervisors, stopping)
        while any(thread.is_alive() for thread in threads):
            _stop_if_one_failed(supervisors, stopping)
            for thread in threads:
                thread.join(POLL_S)
    finally:
        # if anything goes wrong here, no server outlives it
        stopping.set()
        for thread in threads:
            if thread.is_alive():
                thread.join()


def _stop_if_one_failed(supervisors: Sequence[Supervisor], stopping: Event) -> None:
    if any(supervisor.status.state is State.FAILED for supervisor in supervisors):
        stopping.set()


def _exit_code(supervisors: Sequence[Supervisor], stop: Stop, log: Log) -> int:
    not_stopped = [
        supervisor for supervisor in supervisors if supervisor.status.state is not State.STOPPED
    ]
    if not not_stopped:
        log.say("Stopped; every process of the server has ended.")
        return EXIT_INTERRUPTED if stop.interrupted else 0
    failed = not_stopped[0]
    given_up = isinstance(failed.failure, UserError) and failed.status.was_ready
    if failed.failure is not None and not given_up:
        raise failed.failure
    log.say(f"Gave up after {failed.status.restarts} restarts: {failed.status.error}", "ERROR")
    return EXIT_FAILED
