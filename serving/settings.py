"""How one model directory is served, and the command line of vLLM that follows."""

from __future__ import annotations

import os
import secrets
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from gradmap.common.children import module_command
from gradmap.runtimes.vllm_environment import threads_within_quota, vllm_defaults
from serving.flags import TENSOR_FLAGS, flag_value
from serving.ports import reachable_host, url_host
from serving.proof import PASS_VARIABLE, OnlyToOurs
from serving.vllm_server import PARENT_VARIABLE

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# An ASGI class of ours that vLLM puts in front of its routes.
GUARD = "serving.guard.Guard"


@dataclass(frozen=True)
class ServerSettings:
    """How one model is served. drain_s: how long requests in flight may go on after a request to
    stop. certificate, private_key: files for TLS. vllm_flags, environment: passed to vLLM as they
    are. secret: by which the server is known (serving.proof)."""

    directory: Path
    host: str = "127.0.0.1"
    port: int = 8000
    vllm_flags: tuple[str, ...] = ()
    ready_timeout_s: float = 900.0
    drain_s: int = 20
    certificate: Path | None = None
    private_key: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    secret: str = field(default_factory=secrets.token_urlsafe, repr=False, compare=False)

    @property
    def url(self) -> str:
        """The URL at which this machine reaches the server, also if it listens on all addresses."""
        scheme = "https" if self.certificate else "http"
        return f"{scheme}://{url_host(reachable_host(self.host))}:{self.port}"

    @property
    def is_public(self) -> bool:
        return self.host not in LOOPBACK

    def client(self, timeout_s: float) -> httpx.Client:
        """A client of the server, and of nobody else: it knows of no proxy, and gives the key to no
        other program. It trusts the server's certificate, for whatever name that is."""
        direct = httpx.HTTPTransport(verify=self._trust())
        return httpx.Client(
            base_url=self.url, auth=OnlyToOurs(self.secret), timeout=timeout_s, transport=direct
        )

    def _trust(self) -> ssl.SSLContext | bool:
        if self.certificate is None:
            return True
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.check_hostname = False  # it is reached by its address
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # by whomever it was signed
        return context


def build_command(settings: ServerSettings) -> list[str]:
    """Returns vLLM's command line, to which serving.vllm_server adds what the artifact says;
    `vllm_flags` come last."""
    command = module_command("serving.vllm_server", str(settings.directory))
    command += [
        "--host",
        settings.host,
        "--port",
        str(settings.port),
        "--shutdown-timeout",
        str(settings.drain_s),
    ]
    command += ["--middleware", GUARD]
    if settings.certificate and settings.private_key:
        command += [
            "--ssl-certfile",
            str(settings.certificate),
            "--ssl-keyfile",
            str(settings.private_key),
        ]
    return [*command, *settings.vllm_flags]


def server_environment(settings: ServerSettings) -> dict[str, str]:
    """This process's environment, with defaults for what vLLM reads. Its processes must be spawned,
    so that each of them asks for its end with its parent's (see serving.vllm_server)."""
    parallel = flag_value(settings.vllm_flags, *TENSOR_FLAGS) is not None
    return {
        **vllm_defaults(),
        **({} if parallel else threads_within_quota()),
        **os.environ,
        **settings.environment,
        PASS_VARIABLE: settings.secret,
        PARENT_VARIABLE: str(os.getpid()),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
