"""A real endpoint for tests: `gradmap-serve` in a process of its own, with vLLM's CPU build behind
it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from serving.ports import free_port

START_TIMEOUT_S = 300
# By then, nothing may be left of what was killed.
GONE_AFTER_S = 5


@dataclass
class Endpoint:
    """while_starting: status codes by probe, before it was ready."""

    process: subprocess.Popen[bytes]
    url: str
    admin: str
    messages: Path
    while_starting: dict[str, int] = field(default_factory=dict)

    def state(self, probe: str) -> tuple[int, dict]:
        """Status code and states by model."""
        response = httpx.get(f"{self.admin}/{probe}", timeout=10)
        return response.status_code, response.json()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.messages.read_text()
            with suppress(httpx.TransportError):
                if self.state("readyz")[0] == 200:
                    return
            time.sleep(0.2)
        raise AssertionError(self.messages.read_text())

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def serving(
    directory: Path, temporary: Path, *options: str, host: str = "127.0.0.1"
) -> Iterator[Endpoint]:
    """Starts `gradmap-serve`; kills all of it at the end, whatever state it is in."""
    port, admin_port = free_port(), free_port()
    messages = temporary / "messages.txt"
    command = [
        sys.executable,
        "-c",
        "from serving.cli import main; main()",
        str(directory),
        "--host",
        host,
    ]
    ports = [
        "--port",
        str(port),
        "--admin-port",
        str(admin_port),
        "--log",
        str(temporary / "vllm.log"),
    ]
    flags = ["--", "--enforce-eager", "--max-model-len", "512", "--max-num-queued-reqs", "32"]
    with messages.open("wb") as file:
        process = subprocess.Popen(
            [*command, *ports, *options, *flags], stdout=file, stderr=file, env=os.environ
        )
    endpoint = Endpoint(
        process, f"http://{host}:{port}", f"http://127.0.0.1:{admin_port}", messages
    )
    family: list[psutil.Process] = []
    try:
        yield endpoint
        if process.poll() is None:
            family = endpoint.family()
    finally:
        group: list[subprocess.Popen | psutil.Process] = [process, *family]
        for one in group:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        process.wait()


def still_running(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended in time."""
    return [
        process
        for process in psutil.wait_procs(family, timeout=GONE_AFTER_S)[1]
        if not _is_zombie(process)
    ]


def _is_zombie(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True
